"""Step size, momentum and damping from the quadratic model of the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.per_parameter import check_numbers, is_number, of_leaves
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import add_scaled, as_row, from_row, materialize, selected, vdot, zero_unless
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import (
    GradientTransformation,
    apply_updates,
    check_evaluation,
    check_params,
    check_state,
    check_transformation,
    preconditions,
)
from lrkfac.transforms.quadratic import least, within

ADAPTATION = 0.95
"""By how much the dampings may change per step (19/20 in Martens & Grosse 2015)."""
RAISED = 4.0
"""By how much a rejected step raises the damping."""
GOOD, POOR = 0.75, 0.25
"""Reduction ratios above and below which the damping falls and rises."""
SMALLEST, LARGEST = 1e-10, 1e8
"""Bounds of both dampings."""


class QuadraticModelState(NamedTuple):
    """What is carried from step to step; tensors ``[]`` but for the first three.

    Attributes:
        preconditioner: The state of the preconditioner.
        last: The last update, all parameters in one row, ``[P]``.
        total: The decaying sum of the gradients, ``[P]``.
        damping: ``λ`` of the quadratic model.
        factor_damping: ``γ`` of the preconditioner, the product of the two factors' dampings.
        since: Steps since the last statistics; int64.
        learning_rate: ``α`` of the last step.
        momentum: ``μ`` of the last step.
        predicted: The change of the loss that the model predicted for it, at most 0.
        reduction_ratio: The change that came about, over the predicted one.
        rejected: Number of steps that were undone; int64.
    """

    preconditioner: Any
    last: Tensor
    total: Tensor
    damping: Tensor
    factor_damping: Tensor
    since: Tensor
    learning_rate: Tensor
    momentum: Tensor
    predicted: Tensor
    reduction_ratio: Tensor
    rejected: Tensor


def scale_by_quadratic_model(
    preconditioner: GradientTransformation,
    damping: float | Tensor = 0.1,
    weight_decay: PerParameter = 0.0,
    learning_rate: float | Tensor | None = None,
    momentum: float | Tensor | None = None,
    max_kl: float | Tensor | None = None,
    gradient_decay: float | Tensor = 0.0,
) -> GradientTransformation:
    """``α Δ + μ δ₀``, chosen to minimise the quadratic model of this batch's loss.

    ``Δ`` is the preconditioned descent direction, ``δ₀`` the last update, and the model is
    ``M(δ) = ∇hᵀδ + ½ δᵀ(F + (λ + η) I)δ`` with the exact Fisher matrix ``F`` of the batch, weight decay ``η`` and
    ``h = loss + ½ η ‖θ‖²`` (Martens & Grosse 2015, arXiv 1503.05671, sections 6.4 to 6.6 and 7). In each step,

    * a forward derivative along each direction gives the 2 × 2 system for ``α`` and ``μ``;
    * the loss of the batch at the new parameters shows how good the model is: where it fell by more than 3/4 of what
      was predicted, the damping ``λ`` falls, by less than 1/4, it rises (Levenberg and Marquardt);
    * a step after which that loss is higher, or not finite, is undone, and the damping rises. A batch whose loss or
      gradient is not finite changes nothing.

    Where ``evaluation`` has statistics, the preconditioner is tried with three dampings ``γ`` of its factors: its last
    one, a smaller and a larger; the one with the smallest ``M`` is kept. The result is an update, to be added to the
    parameters as it is.

    Args:
        preconditioner: Such as ``precondition_by_fisher(layers)``, or a chain with one. It is handed the damping
            ``γ`` as the extra ``factor_damping``; its own is not used.
        damping: Where both dampings start, positive, in the unit of ``F``. They find their place within some
            tens of steps.
        weight_decay: ``η``, in the unit of ``F``, within the model; or a tree of them, see ``add_decayed_weights``.
        learning_rate: Fixes ``α``.
        momentum: Fixes ``μ``.
        max_kl: Bound on ``δᵀ F δ``, the squared length of a step in the Fisher metric of the batch, and on that of
            ``α Δ`` in the preconditioner's, twice what the step changes the model by in nats per example. A longer
            step, or one with ``|μ| > 1``, is shortened. By default none is: a batch unlike all others, such as of
            another scale by mistake, is then believed at once.
        gradient_decay: Decay of the sum ``Σ_k gradient_decay^k ∇h_{t-k}`` that is preconditioned, in [0, 1); by default
            the batch's own gradient is.

    Raises:
        ValueError: If a number is out of range; in ``init``, if nothing in ``preconditioner`` preconditions; in
            ``update``, if ``params`` is missing or the trees do not fit.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.
        NotImplementedError: In ``update``, if the model uses an operation without forward derivative; names it.
    """
    check_transformation(preconditioner, "preconditioner")
    check_number(damping, "damping", 0, includes_low=False)
    check_numbers(weight_decay, "weight_decay", 0)
    if learning_rate is not None:
        check_number(learning_rate, "learning_rate", 0)
    if momentum is not None:
        check_number(momentum, "momentum", 0, 1)
    if max_kl is not None:
        check_number(max_kl, "max_kl", 0, includes_low=False)
    check_number(gradient_decay, "gradient_decay", 0, 1)
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0

    def init(params: Tree) -> QuadraticModelState:
        check_tree(params, "params")
        inner = preconditioner.init(params)
        if not preconditions(inner):
            raise ValueError(
                "preconditioner: nothing in it preconditions; pass precondition_by_fisher(layers) or a chain with it"
            )
        # Each with memory of its own, as in every later state, where they are picked among candidates: else a step is
        # compiled once more.
        inner = optree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), inner)
        last = torch.zeros_like(as_row(params))
        start = last.new_zeros(()) + damping
        since = torch.zeros_like(start, dtype=torch.int64)
        rate, speed, predicted, ratio = (torch.zeros_like(start) for _ in range(4))
        return QuadraticModelState(
            inner, last, last.clone(), start, start.clone(), since, rate, speed, predicted, ratio, since.clone()
        )

    def update(
        updates: Tree,
        state: QuadraticModelState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, QuadraticModelState]:
        evaluation = check_evaluation(evaluation, "scale_by_quadratic_model")._replace(thin=False)
        check_state(state, QuadraticModelState)
        check_tree(check_params(params, "scale_by_quadratic_model"), "params")
        check_like(params, updates, "updates beside params")
        updates = materialize(updates)
        decay = of_leaves(weight_decay, params, "weight_decay")
        grads = add_scaled(updates, decay, params) if decays else updates
        slope = as_row(grads)
        if slope.shape != state.last.shape:
            raise ValueError(
                f"state: expected one of {len(slope)} parameters, got one of {len(state.last)}; pass what init() or "
                "the last update() of this transformation returned"
            )
        sound = evaluation.loss.isfinite() & slope.isfinite().all()
        since = state.since + 1
        total = add_scaled(slope, gradient_decay, state.total)
        summed = from_row(total, params)

        def precondition(candidate: Tensor) -> tuple[Tensor, Any]:
            found, inner = preconditioner.update(
                summed, state.preconditioner, params, evaluation=evaluation, factor_damping=candidate, **extra
            )
            return -as_row(found), inner

        if evaluation.statistics is None:
            candidates = state.factor_damping[None]
            direction, inner = precondition(state.factor_damping)
            rows = torch.stack([direction, state.last])
        else:
            evaluation = evaluation._replace(statistics=zero_unless(sound, evaluation.statistics))
            change = ADAPTATION ** since.to(state.damping.dtype)
            around = torch.stack([1 / change, torch.ones_like(change), change])
            candidates = (state.factor_damping * around).clamp(SMALLEST, LARGEST)
            directions, inner = vmap(precondition)(candidates)
            rows = torch.cat([directions, state.last[None]])

        gram = evaluation.gram(vmap(lambda row: from_row(row, params))(rows)).to(rows.dtype)
        if is_number(decay):
            curvature = gram + (state.damping + decay) * (rows @ rows.mT)
        else:
            each = optree.tree_map(lambda p, one: torch.zeros_like(p) + one, params, decay)
            curvature = gram + ((state.damping + as_row(each)) * rows) @ rows.mT
        slopes = rows @ slope
        minimum = least(curvature, slopes, learning_rate, momentum)
        if max_kl is not None:
            minimum = within(max_kl, minimum, gram, curvature, slopes, rows[:-1] @ total)
        best = minimum.value.argmin(keepdim=True)
        rate, speed, predicted, kept = (_pick(x, best) for x in (*minimum, candidates))
        if evaluation.statistics is not None:
            inner = optree.tree_map(lambda x: _pick(x, best), inner)
        step = rate * _pick(rows[:-1], best) + speed * rows[-1]

        moved = apply_updates(params, from_row(step, params))
        before, after = evaluation.loss, evaluation.loss_at(moved)
        if decays:
            before, after = before + _penalty(decay, params), after + _penalty(decay, moved)
        rounding = 16 * torch.finfo(after.dtype).eps * before.abs()
        accepted = after - before <= rounding  # false where one of them is not finite
        ratio = (after - before).to(predicted.dtype) / predicted.clamp(max=-torch.finfo(predicted.dtype).tiny)
        one = torch.ones_like(ratio)
        factor = torch.where(ratio > GOOD, ADAPTATION * one, torch.where(ratio < POOR, one / ADAPTATION, one))
        factor = torch.where(accepted, factor, RAISED * one)
        step = torch.where(accepted, step, 0)
        new = QuadraticModelState(
            inner,
            step,
            total,
            (state.damping * factor).clamp(SMALLEST, LARGEST),
            kept,
            torch.zeros_like(since) if evaluation.statistics is not None else since,
            rate,
            speed,
            predicted,
            ratio,
            state.rejected + ~accepted,
        )
        return from_row(step, params), selected(sound, new, state)

    return GradientTransformation(init, update)


def _penalty(decay: PerParameter, params: Tree) -> Tensor:
    """``½ η ‖θ‖²``."""
    return 0.5 * decay * vdot(params, params) if is_number(decay) else 0.5 * vdot(params, params, decay)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for an index ``[1]``, without asking for its value."""
    return x.index_select(0, index)[0]
