"""The length of a step from the slope and the curvature that the next batch finds along it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.packing import Rows, as_rows, from_rows, products
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import all_finite, counter, materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_params,
    check_state,
    transformation,
)

AVERAGED = 0.9
"""Decay of the averages of slopes and curvatures, per step."""
FASTEST = 0.1
"""Largest change of the logarithm of the rate per step, far from where it rests."""
OVER_RELAXED, MOST = 5.0, 0.45
"""Multiple of the squared agreement of two batches by which a step is over-relaxed, and the most of it; 1/2 ends all
progress."""
BEYOND = 1.5
"""Longest step, in lengths of the minimum of its own batch's model."""
OUTLIER = 10.0
"""Multiple of the average beyond which a batch is cut: one batch unlike all others then counts as a few."""
LOWERED = 0.25
"""Factor of the rate after a step that led to where no batch has a finite loss."""


class SlopeAndCurvatureState(NamedTuple):
    """State of ``scale_by_slope_and_curvature``; tensors ``[]`` but for the first.

    Attributes:
        last: Last step, a tuple of rows: one of all parameters with fewer than 65536 entries, one for each other.
        rate: Length of a step in units of the direction; 0 before the first.
        length: That of the last step: the rate, or less where the batch's own model ends before.
        slope: Average of ``-gᵀδ``, the decrease of the loss that the next batch's gradient ``g`` still finds along a
            step ``δ`` after it, in nats.
        curvature: Average of ``δᵀ F δ`` with the next batch's Fisher matrix, in nats.
        promised: Average of ``-gᵀδ`` with the gradient of the batch that made the step.
        size: Average of the sum of their magnitudes.
        along_last: ``δᵀ F δ / length²``, at the last statistics.
        along_next: The same of the direction of the step that followed, with the same batch.
        expected: ``-gᵀδ`` of the last step with its own batch.
        rejected: Number of steps that were taken back; int64.
        failures: Number of the last evaluations in a row that were not finite; int64.
    """

    last: Rows
    rate: Tensor
    length: Tensor
    slope: Tensor
    curvature: Tensor
    promised: Tensor
    size: Tensor
    along_last: Tensor
    along_next: Tensor
    expected: Tensor
    rejected: Tensor
    failures: Tensor


NUMBERS = SlopeAndCurvatureState._fields[1:-2]


def scale_by_slope_and_curvature(start: float | Tensor = 0.008) -> GradientTransformation:
    """Return ``-rate * u`` with a rate that follows from what the next batch finds along each step.

    A batch cannot test the step computed from it, since its own gradient confirms it. The next batch can. With its
    gradient ``g`` and Fisher matrix ``F`` at the new parameters, the last step ``δ`` leaves a slope ``s = -gᵀδ``, which
    is positive where a longer step had been better for this batch and negative where a shorter one, and a curvature
    ``c = δᵀFδ``. With averages over some ten steps,

    * the rate grows where ``s + ρ c`` is positive, else it falls, by at most a tenth per step and less near its place.
      At ``ρ = 0`` it rests where each step ends at the minimum along it, which in the long run is too short: a step
      along which the loss merely has no more slope has spent itself on the steepest directions. With ``ρ > 0`` steps
      are over-relaxed, by a factor ``1 / (1 - ρ)``. With ``ρ = 1/2`` they would go to and fro and end nowhere;
    * ``ρ`` follows the noise. Of the decrease that the step's own batch promised, the next batch confirms the share
      ``(s + c) / promised``. It is 1 without noise, and ``ρ`` is 5 times its square, at most 0.45;
    * no step is longer than 1.5 times the way to the minimum of its own batch's model, ``uᵀg / uᵀFu``. Twice the way
      would leave the batch's loss as it was.

    Curvatures are measured where ``evaluation`` has statistics, by two forward derivatives, and kept until the next
    ones. So evaluations need statistics every few steps, also after a direction that does not use them.

    The result is an update: add it to the parameters unchanged. It does not depend on the unit of ``u``, nor on
    that of the loss. A batch whose loss, gradient or direction is not finite changes nothing. The second of them in a
    row takes the last step back, to where a batch had a finite loss, and the rate falls to a quarter. What comes before
    in a chain keeps its own state finite: wrap it in ``apply_if_finite``.

    Args:
        start: Root mean square of the first step, positive. The rate soon forgets it: it grows or falls by an order of
            magnitude in some thirty steps.

    Returns:
        A transformation with a ``SlopeAndCurvatureState``. Its ``update`` takes the extra ``evaluation``. The slope of
        a penalty that comes before in the chain, as ``add_decayed_weights``, is not counted.

    Raises:
        ValueError: If ``start`` is not positive and finite; in ``update``, if ``params`` is missing or the
            trees or the state do not fit.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.
        NotImplementedError: In ``update``, if the model uses an operation without forward derivative; names it.

    Examples:
        >>> import torch, lrkfac
        >>> params, x = {"w": torch.zeros(3)}, torch.eye(3)
        >>> model = lambda params, x: x @ params["w"][:, None]
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate, tx = lrkfac.evaluator(model, lrkfac.gaussian(), layers), scale_by_slope_and_curvature()
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     evaluation = evaluate(params, x, torch.ones(3, 1))
        ...     updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        ...     params = lrkfac.apply_updates(params, updates)
        >>> params["w"].round(decimals=2)
        tensor([1., 1., 1.])
    """
    return transformation(ScaleBySlopeAndCurvature(start))


@dataclass(frozen=True, eq=False)
class ScaleBySlopeAndCurvature:
    """See ``scale_by_slope_and_curvature``."""

    start: float | Tensor

    def __post_init__(self) -> None:
        check_number(self.start, "start", 0, includes_low=False)

    def init(self, params: Tree) -> SlopeAndCurvatureState:
        """Return the state before the first step."""
        check_tree(params, "params")
        last = tuple([torch.zeros_like(row) for row in as_rows(params)])
        zero = counter(params).to(widest(torch.float32, *[row.dtype for row in last]))
        numbers = [zero.clone() for _ in range(len(NUMBERS))]
        return SlopeAndCurvatureState._make([last, *numbers, counter(params), counter(params)])

    def update(
        self,
        updates: Tree,
        state: SlopeAndCurvatureState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, SlopeAndCurvatureState]:
        """Return the step and the next state; see ``GradientTransformation``."""
        evaluation = check_evaluation(evaluation, "scale_by_slope_and_curvature")
        check_state(state, SlopeAndCurvatureState)
        params = check_params(params, "scale_by_slope_and_curvature", updates)
        check_tree(params, "params")
        check_like(params, updates, "updates beside params")
        direction, gradient = as_rows(materialize(updates)), as_rows(materialize(evaluation.grads))
        if [len(row) for row in direction] != [len(row) for row in state.last]:
            raise ValueError(
                f"state: expected one of {sum(map(len, direction))} parameters, got one of "
                f"{sum(map(len, state.last))}; pass what init() or the last update() of this transformation returned"
            )
        sound = all_finite((evaluation.loss, gradient, direction))
        looked = _looked(state, evaluation, gradient, direction, params)
        promise = products(direction, gradient).to(state.rate.dtype)
        after = _stepped(_adapted(looked, self._first(direction, state)), promise)
        # Parameters at which no batch has a finite loss: the last step led there.
        undone = ~sound & (state.failures > 0) & (state.length > 0)
        forward = [-after.length.to(row.dtype) * row for row in direction]
        kept = tuple([torch.where(sound, new, old) for new, old in zip(forward, state.last, strict=True)])
        share = torch.where(sound, 1, -undone.to(state.rate.dtype))
        step = from_rows(tuple([share.to(row.dtype) * row for row in kept]), params)
        return step, _selected(sound, after, undone, state)._replace(last=kept)

    def _first(self, direction: Rows, state: SlopeAndCurvatureState) -> Tensor:
        """Return the rate with which a direction has the root mean square ``start``; 0 for one of zeros."""
        mean_square = (products(direction, direction) / sum(map(len, direction))).to(state.rate.dtype)
        return torch.where(mean_square > 0, self.start * mean_square.rsqrt(), 0)


def _looked(
    state: SlopeAndCurvatureState, evaluation: Evaluation, gradient: Rows, direction: Rows, params: Tree
) -> SlopeAndCurvatureState:
    """Return the state with what the batch finds along the last step in its averages."""
    along_last, along_next, dtype = state.along_last, state.along_next, state.rate.dtype
    square, took = state.length.square(), state.length > 0
    if evaluation.statistics is not None:
        gram = evaluation.gram(from_rows(state.last, params), from_rows(direction, params)).to(dtype)
        along_next = torch.where(gram[1, 1] > 0, gram[1, 1], along_next)
        along_last = torch.where(took & (gram[0, 0] > 0), gram[0, 0] / square, along_next)
    found = torch.stack([-products(state.last, gradient).to(dtype), along_last * square, state.expected])
    size = found.abs().sum()
    found = torch.cat([found, size[None]])
    # A size of 0, as before the first step, cuts nothing.
    found = found * torch.where(state.size > 0, (OUTLIER * state.size / size).nan_to_num(1.0).clamp(max=1), 1)
    old = torch.stack([state.slope, state.curvature, state.promised, state.size])
    slope, curvature, promised, size = torch.where(took, torch.lerp(old, found, 1 - AVERAGED), old).unbind()
    return state._replace(
        slope=slope, curvature=curvature, promised=promised, size=size, along_last=along_last, along_next=along_next
    )


def _adapted(state: SlopeAndCurvatureState, first: Tensor) -> SlopeAndCurvatureState:
    """Return the state with the rate for the next step."""
    tiny = torch.finfo(state.rate.dtype).tiny
    agreement = (state.slope + state.curvature).clamp(min=0) / state.promised.clamp(min=tiny)
    left = state.slope / state.curvature.clamp(min=tiny) + (OVER_RELAXED * agreement.square()).clamp(max=MOST)
    left = left.clamp(-1, 1)
    # After a step of length 0, the averages say nothing new: the rate would follow the old ones without end.
    changed = state.rate * torch.where(state.length > 0, torch.exp(FASTEST * left * left.abs().sqrt()), 1)
    return state._replace(rate=torch.where(state.rate > 0, changed, first))


def _stepped(state: SlopeAndCurvatureState, promise: Tensor) -> SlopeAndCurvatureState:
    """Return the state after a step along a direction with this slope, not far beyond the batch's own model."""
    ahead = promise > 0
    bound = torch.where((state.along_next > 0) & ahead, BEYOND * promise / state.along_next, torch.inf)
    rate = torch.minimum(state.rate, torch.maximum(bound, math.exp(-FASTEST) * state.rate))
    length = torch.where(ahead, torch.minimum(rate, bound), 0)
    return state._replace(rate=rate, length=length, expected=length * promise)


def _selected(
    sound: Tensor, after: SlopeAndCurvatureState, undone: Tensor, state: SlopeAndCurvatureState
) -> SlopeAndCurvatureState:
    """Return the state after a batch: the one before it, if it is not finite, and lower if the last step is undone."""
    failed = state._replace(
        rate=torch.where(undone, LOWERED * state.rate, state.rate), length=torch.where(undone, 0, state.length)
    )
    new, old = (torch.stack([getattr(one, name) for name in NUMBERS]) for one in (after, failed))
    numbers = torch.where(sound, new, old).unbind()
    failures = torch.where(sound, 0, state.failures + 1)
    return SlopeAndCurvatureState._make([state.last, *numbers, state.rejected + undone, failures])
