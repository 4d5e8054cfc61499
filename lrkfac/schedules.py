"""Schedules: functions of the number of steps taken, under the names and arguments of optax.

A schedule maps a step (int64, ``[]``) to a number or a tensor ``[]``. Any function that does so is one. Those of this
module are frozen dataclasses, so that they copy, pickle and compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_number
from lrkfac.core.base.dtypes import most_precise

__all__ = [
    "constant_schedule",
    "exponential_decay",
    "join_schedules",
    "piecewise_constant_schedule",
    "warmup_cosine_decay_schedule",
]

Schedule = Callable[[Tensor], float | Tensor]
"""From the number of steps taken so far (int64, ``[]``) to a value."""


def constant_schedule(value: float) -> Schedule:
    """Return a schedule that is ``value`` at every step.

    Args:
        value: Any finite number.

    Returns:
        The schedule.

    Raises:
        ValueError: If ``value`` is not finite.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> constant_schedule(0.1)(torch.tensor(7))
        0.1
    """
    check_number(value, "value", -math.inf)
    return _Constant(value)


def exponential_decay(
    init_value: float,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    """Return a schedule ``init_value * decay_rate^((step - transition_begin) / transition_steps)``.

    Args:
        init_value: Value up to the step ``transition_begin``.
        transition_steps: Number of steps in which the value changes by the factor ``decay_rate``, ≥ 1.
        decay_rate: Factor per ``transition_steps``, > 0.
        transition_begin: Step at which the value begins to change, ≥ 0.
        staircase: Whether the value changes once in ``transition_steps`` only.
        end_value: Bound of the value: from below where ``decay_rate < 1``, else from above; ``None`` for none.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> exponential_decay(1.0, transition_steps=10, decay_rate=0.5)(torch.tensor(20)).item()
        0.25
    """
    check_number(init_value, "init_value", -math.inf)
    check_number(transition_steps, "transition_steps", 1)
    check_number(decay_rate, "decay_rate", 0, includes_low=False)
    check_number(transition_begin, "transition_begin", 0)
    check_flag(staircase, "staircase")
    if end_value is not None:
        check_number(end_value, "end_value", -math.inf)
    return _Exponential(init_value, transition_steps, decay_rate, transition_begin, staircase, end_value)


def warmup_cosine_decay_schedule(
    init_value: float, peak_value: float, warmup_steps: int, decay_steps: int, end_value: float = 0.0
) -> Schedule:
    """Return a schedule that rises linearly to ``peak_value``, then falls to ``end_value`` by half a cosine.

    Args:
        init_value: Value at step 0.
        peak_value: Value at step ``warmup_steps``.
        warmup_steps: Length of the rise, ≥ 0.
        decay_steps: Length of rise and fall together, > ``warmup_steps``.
        end_value: Value from step ``decay_steps`` on.

    Returns:
        The schedule.

    Raises:
        ValueError: If a value is not finite, or the steps are out of order.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> schedule = warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=10, decay_steps=100)
        >>> [round(schedule(torch.tensor(step)).item(), 3) for step in (0, 5, 10, 55, 100)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    for name, value in {"init": init_value, "peak": peak_value, "end": end_value}.items():
        check_number(value, f"{name}_value", -math.inf)
    for name, steps in {"warmup": warmup_steps, "decay": decay_steps}.items():
        check_number(steps, f"{name}_steps", 0)
    if not warmup_steps < decay_steps:
        raise ValueError(f"warmup_steps: expected 0 <= warmup_steps < decay_steps = {decay_steps}, got {warmup_steps}")
    return _WarmupCosine(init_value, peak_value, warmup_steps, decay_steps, end_value)


def piecewise_constant_schedule(init_value: float, boundaries_and_scales: Mapping[int, float]) -> Schedule:
    """Return a schedule that multiplies ``init_value`` by the scale of each boundary that has been reached.

    Args:
        init_value: Value at step 0.
        boundaries_and_scales: From a step to the factor that applies from this step on: ``{100: 0.1}`` divides by 10
            at step 100.

    Returns:
        The schedule.

    Raises:
        ValueError: If a value is not finite, or a boundary is negative.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> piecewise_constant_schedule(1.0, {100: 0.5})(torch.tensor(100)).item()
        0.5
    """
    check_number(init_value, "init_value")
    if not isinstance(boundaries_and_scales, Mapping):
        got = type(boundaries_and_scales).__name__
        raise TypeError(f"boundaries_and_scales: expected a mapping from steps to factors, got {got}")
    for boundary, factor in boundaries_and_scales.items():
        check_number(boundary, "boundaries_and_scales: a boundary", 0)
        check_number(factor, "boundaries_and_scales: a factor")
    return _PiecewiseConstant(init_value, tuple(boundaries_and_scales.items()))


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Return a schedule that runs one schedule after another, each from its own step 0.

    Args:
        schedules: At least one.
        boundaries: Steps at which the second, third, … begins, rising.

    Returns:
        The schedule.

    Raises:
        ValueError: If there is not one boundary between each two schedules, or they are not positive and rising.
        TypeError: If a schedule is not callable.

    Examples:
        >>> join_schedules([constant_schedule(1.0), constant_schedule(2.0)], [5])(torch.tensor(5)).item()
        2.0
    """
    for what, given in (("schedules", schedules), ("boundaries", boundaries)):
        if not isinstance(given, Sequence):
            raise TypeError(f"{what}: expected a sequence, got {type(given).__name__}")
    for one in schedules:
        if not callable(one):
            raise TypeError(f"schedules: expected schedules, got {one!r} among them; use constant_schedule({one!r})")
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"boundaries: expected {max(len(schedules) - 1, 0)} for {len(schedules)} schedules, at least one, got "
            f"{len(boundaries)}"
        )
    for low, high in zip((0, *boundaries), boundaries, strict=False):
        check_number(high, "boundaries", low, includes_low=False)
    return _Joined(tuple(schedules), tuple(boundaries))


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: Tensor) -> float:
        return self.value


@dataclass(frozen=True)
class _Exponential:
    init_value: float
    transition_steps: int
    decay_rate: float
    transition_begin: int
    staircase: bool
    end_value: float | None

    def __call__(self, step: Tensor) -> Tensor:
        passed = (_real(step) - self.transition_begin).clamp(min=0) / self.transition_steps
        value = self.init_value * self.decay_rate ** (passed.floor() if self.staircase else passed)
        if self.end_value is None:
            return value
        return value.clamp(min=self.end_value) if self.decay_rate < 1 else value.clamp(max=self.end_value)


@dataclass(frozen=True)
class _WarmupCosine:
    init_value: float
    peak_value: float
    warmup_steps: int
    decay_steps: int
    end_value: float

    def __call__(self, step: Tensor) -> Tensor:
        t = _real(step)
        rising = self.init_value + (self.peak_value - self.init_value) * t / max(self.warmup_steps, 1)
        progress = ((t - self.warmup_steps) / (self.decay_steps - self.warmup_steps)).clamp(0, 1)
        falling = self.end_value + (self.peak_value - self.end_value) * (1 + torch.cos(math.pi * progress)) / 2
        return torch.where(t < self.warmup_steps, rising, falling)


@dataclass(frozen=True)
class _PiecewiseConstant:
    init_value: float
    boundaries_and_scales: tuple[tuple[int, float], ...]

    def __call__(self, step: Tensor) -> Tensor:
        value = torch.full_like(_real(step), self.init_value)
        for boundary, factor in self.boundaries_and_scales:
            value = torch.where(step >= boundary, value * factor, value)
        return value


@dataclass(frozen=True)
class _Joined:
    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __call__(self, step: Tensor) -> Tensor:
        value = _as_tensor(self.schedules[0](step), step)
        for begin, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            value = torch.where(step >= begin, _as_tensor(schedule((step - begin).clamp(min=0)), step), value)
        return value


def _as_tensor(value: float | Tensor, step: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(_real(step), value)


def _real(step: Tensor) -> Tensor:
    return step.to(most_precise(step.device))
