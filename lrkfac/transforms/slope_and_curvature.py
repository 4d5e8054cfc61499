"""The length of a step from the slope and the curvature that the next batch finds along it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import all_finite, counter, materialize, scaled, selected, vdot, zero_unless, zeros_like
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import GradientTransformation, check_evaluation, check_state, transformation

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
        last: Last step, a tree like the parameters.
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

    last: Tree
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


def scale_by_slope_and_curvature(start: float | Tensor = 0.008) -> GradientTransformation:
    """Return ``-rate * u`` with a rate that follows from what the next batch finds along each step.

    A batch is no judge of the step that was made of it: its own gradient confirms it. The next one is. With its
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

    The result is an update, to be added to the parameters as it is. It does not depend on the unit of ``u``, nor on
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
        ValueError: If ``start`` is not positive and finite; in ``update``, if the trees or the state do not fit.
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
        last, like = zeros_like(params), tree_leaves(params)
        zero = torch.zeros((), dtype=widest(torch.float32, *[x.dtype for x in like]), device=counter(params).device)
        numbers = [zero.clone() for _ in range(9)]
        return SlopeAndCurvatureState(last, *numbers, counter(params), counter(params))

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
        check_like(state.last, updates, "scale_by_slope_and_curvature: updates")
        direction, gradient = materialize(updates), materialize(evaluation.grads)
        check_like(state.last, gradient, "evaluation.grads")
        sound = all_finite((evaluation.loss, gradient, direction))
        looked = _looked(state, evaluation, gradient, direction)
        promise = vdot(direction, gradient).to(state.rate.dtype)
        after = _stepped(_adapted(looked, self._first(direction, state)), promise)
        # Parameters at which no batch has a finite loss: the last step led there.
        undone = ~sound & (state.failures > 0) & (state.length > 0)
        failed = state._replace(
            rate=torch.where(undone, LOWERED * state.rate, state.rate),
            length=torch.where(undone, 0, state.length),
            rejected=state.rejected + undone,
            failures=state.failures + 1,
        )
        forward = scaled(-after.length, direction)
        step = selected(sound, forward, zero_unless(undone, scaled(-1.0, state.last)))
        kept = optree.tree_map(lambda new, old: torch.where(sound, new, old), forward, state.last)
        return step, selected(sound, after, failed)._replace(last=kept)

    def _first(self, direction: Tree, state: SlopeAndCurvatureState) -> Tensor:
        """Return the rate with which a direction has the root mean square ``start``; 0 for one of zeros."""
        count = sum(x.numel() for x in tree_leaves(direction))
        mean_square = (vdot(direction, direction) / max(count, 1)).to(state.rate.dtype)
        return torch.where(mean_square > 0, self.start * mean_square.rsqrt(), 0)


def _looked(
    state: SlopeAndCurvatureState, evaluation: Evaluation, gradient: Tree, direction: Tree
) -> SlopeAndCurvatureState:
    """Return the state with what the batch finds along the last step in its averages."""
    along_last, along_next, dtype = state.along_last, state.along_next, state.rate.dtype
    took = state.length > 0
    if evaluation.statistics is not None:
        gram = evaluation.gram(state.last, direction).to(dtype)
        along_next = torch.where(gram[1, 1] > 0, gram[1, 1], along_next)
        along_last = torch.where(took & (gram[0, 0] > 0), gram[0, 0] / state.length.square(), along_next)
    slope, curvature = -vdot(state.last, gradient).to(dtype), along_last * state.length.square()
    found = torch.stack([slope, curvature, state.expected])
    size = found.abs().sum()
    found = found * torch.where(state.size > 0, (OUTLIER * state.size / size).clamp(max=1), 1).nan_to_num(1.0)
    new = torch.cat([found, found.abs().sum()[None]])
    old = torch.stack([state.slope, state.curvature, state.promised, state.size])
    averages = torch.where(took, AVERAGED * old + (1 - AVERAGED) * new, old).unbind()
    return state._replace(
        slope=averages[0], curvature=averages[1], promised=averages[2], size=averages[3],
        along_last=along_last, along_next=along_next,
    )  # fmt: skip


def _adapted(state: SlopeAndCurvatureState, first: Tensor) -> SlopeAndCurvatureState:
    """Return the state with the rate for the next step."""
    tiny = torch.finfo(state.rate.dtype).tiny
    agreement = (state.slope + state.curvature) / state.promised.clamp(min=tiny)
    relaxed = (OVER_RELAXED * agreement.clamp(min=0).square()).clamp(max=MOST) * state.curvature
    excess = ((state.slope + relaxed) / state.curvature.clamp(min=tiny)).clamp(-1, 1)
    changed = state.rate * torch.exp(FASTEST * excess * excess.abs().sqrt())
    return state._replace(rate=torch.where(state.rate > 0, changed, first))


def _stepped(state: SlopeAndCurvatureState, promise: Tensor) -> SlopeAndCurvatureState:
    """Return the state after a step along a direction with this slope: no longer than the batch's own model."""
    curved = state.along_next > 0
    bound = torch.where(curved, BEYOND * promise / torch.where(curved, state.along_next, 1), torch.inf)
    rate = torch.minimum(state.rate, torch.maximum(bound, math.exp(-FASTEST) * state.rate))
    length = torch.where(promise > 0, torch.minimum(rate, bound), 0)
    return state._replace(
        rate=rate, length=length, expected=length * promise, failures=torch.zeros_like(state.failures)
    )
