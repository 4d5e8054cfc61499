"""Step sizes: constant, or a function of the number of steps taken."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import need_number
from lrkfac.core.base.per_parameter import at_step, need_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import counter, scaled
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, need_state, stateless

Schedule = Callable[[Tensor], float | Tensor]
"""From the number of steps taken so far (int64, ``[]``) to a value."""


class ScheduleState(NamedTuple):
    """``steps``: number of updates so far, int64 ``[]``."""

    steps: Tensor


def scale(factor: float | Tensor) -> GradientTransformation:
    """``factor * u``.

    Raises:
        ValueError: If ``factor`` is a non-finite number.
        TypeError: If an argument has the wrong type.
    """
    need_number(factor, "factor", -math.inf)
    return stateless(lambda updates, params, **extra: scaled(factor, updates))


def scale_by_learning_rate(learning_rate: PerParameter) -> GradientTransformation:
    """``-learning_rate * u``: turns a direction of ascent into an update to add.

    Args:
        learning_rate: A number ≥ 0, a tensor ``[]`` or a schedule; or a tree of them like the parameters, or one that
            ends earlier: ``{"encoder": 0.01, "head": warmup_cosine_schedule(0.1, 10, 100)}``.

    Raises:
        ValueError: If it is a negative or non-finite number; in ``init``, if it is a tree that does not fit.
        TypeError: If an argument has the wrong type.
    """
    need_numbers(learning_rate, "learning_rate", 0, schedules=True)

    def change(updates: Tree, rate: PerParameter) -> Tree:
        return scaled(of_leaves(optree.tree_map(operator.neg, rate), updates, "learning_rate"), updates)

    def check(params: Tree) -> None:
        if not callable(learning_rate):
            of_leaves(learning_rate, params, "learning_rate")

    if not any(callable(one) for one in optree.tree_leaves(learning_rate)):
        return stateless(lambda updates, params, **extra: change(updates, learning_rate), check)

    def init(params: Tree) -> ScheduleState:
        check_tree(params, "params")
        check(params)
        return ScheduleState(counter(params))

    def update(updates: Tree, state: ScheduleState, params: Tree = None, **extra: Any) -> tuple[Tree, ScheduleState]:
        check_tree(updates, "updates")
        need_state(state, ScheduleState)
        return change(updates, at_step(learning_rate, state.steps)), ScheduleState(state.steps + 1)

    return GradientTransformation(init, update)


def constant_schedule(value: float) -> Schedule:
    """The same ``value`` at every step.

    Raises:
        ValueError: If it is not finite.
        TypeError: If an argument has the wrong type.
    """
    need_number(value, "value", -math.inf)
    return lambda step: value


def warmup_cosine_schedule(
    peak_value: float, warmup_steps: int, total_steps: int, initial_value: float = 0.0, final_value: float = 0.0
) -> Schedule:
    """Linear from ``initial_value`` to ``peak_value``, then half a cosine down to ``final_value``.

    Args:
        peak_value: Reached at step ``warmup_steps``.
        warmup_steps: Length of the rise, ≥ 0.
        total_steps: Step at which ``final_value`` is reached and kept, > ``warmup_steps``.
        initial_value: Value at step 0.
        final_value: Value from step ``total_steps`` on.

    Raises:
        ValueError: If a value is not finite or the steps are out of order.
        TypeError: If an argument has the wrong type.
    """
    for name, value in {"peak": peak_value, "initial": initial_value, "final": final_value}.items():
        need_number(value, f"{name}_value", -math.inf)
    for name, value in {"warmup": warmup_steps, "total": total_steps}.items():
        need_number(value, f"{name}_steps", 0)
    if not warmup_steps < total_steps:
        raise ValueError(f"warmup_steps: expected 0 <= warmup_steps < total_steps = {total_steps}, got {warmup_steps}")

    def schedule(step: Tensor) -> Tensor:
        t = _real(step)
        rising = initial_value + (peak_value - initial_value) * t / max(warmup_steps, 1)
        progress = ((t - warmup_steps) / (total_steps - warmup_steps)).clamp(0, 1)
        falling = final_value + (peak_value - final_value) * (1 + torch.cos(math.pi * progress)) / 2
        return torch.where(t < warmup_steps, rising, falling)

    return schedule


def exponential_schedule(initial_value: float, decay_rate: float, steps: int = 1) -> Schedule:
    """``initial_value * decay_rate^(step / steps)``.

    Args:
        initial_value: Value at step 0.
        decay_rate: Factor per ``steps``, > 0.
        steps: Number of steps in which the value changes by ``decay_rate``, ≥ 1.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.
    """
    need_number(initial_value, "initial_value", -math.inf)
    need_number(decay_rate, "decay_rate", 0, includes_low=False)
    need_number(steps, "steps", 1)
    return lambda step: initial_value * decay_rate ** (_real(step) / steps)


def piecewise_constant_schedule(initial_value: float, scales: Mapping[int, float]) -> Schedule:
    """``initial_value`` times the scales of all boundaries reached: ``{100: 0.1}`` divides by 10 at step 100.

    Args:
        initial_value: Value at step 0.
        scales: From a step to the factor that holds from this step on.

    Raises:
        ValueError: If a value is not finite or a boundary is negative.
        TypeError: If an argument has the wrong type.
    """
    need_number(initial_value, "initial_value")
    if not isinstance(scales, Mapping):
        raise TypeError(f"scales: expected a mapping from steps to factors, got {type(scales).__name__}")
    for boundary, factor in scales.items():
        need_number(boundary, "scales: a boundary", 0)
        need_number(factor, "scales: a factor")

    def schedule(step: Tensor) -> Tensor:
        value = torch.full_like(_real(step), initial_value)
        for boundary, factor in scales.items():
            value = torch.where(step >= boundary, value * factor, value)
        return value

    return schedule


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another: the next one starts, from its own step 0, at each boundary.

    Args:
        schedules: At least one.
        boundaries: The steps at which the second, third, … begins, rising.

    Raises:
        ValueError: If there is not one boundary between each two schedules, or they are not positive and rising.
        TypeError: If a schedule is not callable.
    """
    for what, given in (("schedules", schedules), ("boundaries", boundaries)):
        if not isinstance(given, Sequence):
            raise TypeError(f"{what}: expected a sequence, got {type(given).__name__}")
    schedules, boundaries = tuple(schedules), tuple(boundaries)
    for one in schedules:
        if not callable(one):
            raise TypeError(f"schedules: expected schedules, got {one!r} among them; use constant_schedule({one!r})")
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"boundaries: expected {max(len(schedules) - 1, 0)} for {len(schedules)} schedules, at least one, got "
            f"{len(boundaries)}"
        )
    for low, high in zip((0, *boundaries), boundaries, strict=False):
        need_number(high, "boundaries", low, includes_low=False)

    def schedule(step: Tensor) -> Tensor:
        value = _value(schedules[0](step), step)
        for begin, one in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(step >= begin, _value(one((step - begin).clamp(min=0)), step), value)
        return value

    return schedule


def _value(value: float | Tensor, step: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(_real(step), value)


def _real(step: Tensor) -> Tensor:
    return step.to(torch.float64 if step.device.type != "mps" else torch.float32)
