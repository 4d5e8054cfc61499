"""Step size, momentum and damping from the quadratic model of the loss (Martens & Grosse 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass
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
from lrkfac.transforms.quadratic_minimum import Minimum, least, shortened

ADAPTATION = 0.95
"""Factor by which a damping may change per step: ``ω₁ = (19/20)^T₁`` of section 6.5, per step."""
RAISED = 4.0
"""Factor by which an undone step raises the damping."""
GOOD, POOR = 0.75, 0.25
"""Reduction ratios above and below which the damping falls and rises (section 6.5)."""
SMALLEST, LARGEST = 1e-10, 1e8
"""Bounds of both dampings: within them, no product with a float32 curvature underflows or overflows."""


class QuadraticModelState(NamedTuple):
    """State of ``scale_by_quadratic_model``; tensors ``[]`` but for the first three.

    Attributes:
        preconditioner: State of the preconditioner.
        last: Last update, all parameters in one row, ``[P]``.
        total: Decaying sum of the gradients, ``[P]``.
        damping: ``λ`` of the quadratic model.
        factor_damping: ``γ`` of the preconditioner, the product of the two factors' dampings.
        since: Steps since the last statistics; int64.
        learning_rate: ``α`` of the last step.
        momentum: ``μ`` of the last step.
        predicted: Change of the loss that the model predicted for the last step, at most 0.
        reduction_ratio: Change of the loss that came about, over the predicted one.
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
    kl_clip: float | Tensor | None = None,
    gradient_decay: float | Tensor = 0.0,
) -> GradientTransformation:
    """Return updates ``α Δ + μ δ₀`` that minimise the quadratic model of the batch's loss.

    ``Δ`` is the preconditioned descent direction, ``δ₀`` the last update. The model is
    ``M(δ) = ∇hᵀδ + ½ δᵀ(F + (λ + η) I)δ`` with the exact Fisher matrix ``F`` of the batch, weight decay ``η`` and
    ``h = loss + ½ η ‖θ‖²`` (Martens & Grosse 2015, arXiv 1503.05671, sections 6.4 to 6.6 and 7). In each step,

    * a forward derivative along each direction gives the 2 × 2 system for ``α`` and ``μ``;
    * the batch's loss at the new parameters judges the model: where it fell by more than 3/4 of the prediction, the
      damping ``λ`` falls; by less than 1/4, it rises (Levenberg and Marquardt);
    * a step after which that loss is higher, or not finite, is undone, and the damping rises. A batch whose loss or
      gradient is not finite changes nothing.

    Where ``evaluation`` has statistics, the preconditioner runs with three dampings ``γ`` of its factors: its last
    one, a smaller and a larger. The one with the smallest ``M`` is kept. The result is an update, to be added to the
    parameters as it is.

    Args:
        preconditioner: Such as ``precondition_by_fisher(layers)``, or a chain with one. It receives the damping
            ``γ`` as the extra ``factor_damping``; its own is not used.
        damping: Start of both dampings, positive, in the unit of ``F``. They find their place within some tens of
            steps.
        weight_decay: ``η``, in the unit of ``F``, within the model; or a tree of them, see ``add_decayed_weights``.
        kl_clip: Bound on ``δᵀ F δ``, the squared length of a step in the Fisher metric of the batch, and on that of
            ``α Δ`` in the preconditioner's metric; see ``clip_by_kl``. A longer step, or one with ``|μ| > 1``, is
            shortened. ``None`` for no bound: a batch unlike all others, such as one of another scale, then counts in
            full.
        gradient_decay: Decay of the sum ``Σ_k gradient_decay^k ∇h_{t-k}`` that is preconditioned, in [0, 1); 0
            preconditions the batch's own gradient.

    Returns:
        The transformation; its state is a ``QuadraticModelState``.

    Raises:
        ValueError: If a number is out of range; in ``init``, if nothing in ``preconditioner`` preconditions; in
            ``update``, if ``params`` is missing or the trees do not fit.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.
        NotImplementedError: In ``update``, if the model uses an operation without forward derivative; names it.

    Examples:
        >>> import lrkfac
        >>> params, x = {"w": torch.zeros(3)}, torch.eye(3)
        >>> model = lambda params, x: (x @ params["w"][:, None])
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.gaussian(), layers)(params, x, torch.ones(3, 1))
        >>> tx = scale_by_quadratic_model(lrkfac.precondition_by_fisher(layers), damping=1e-6)
        >>> updates, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> updates["w"].round(decimals=3)
        tensor([1., 1., 1.])
    """
    check_transformation(preconditioner, "preconditioner")
    tx = ScaleByQuadraticModel(preconditioner, damping, weight_decay, kl_clip, gradient_decay)
    return GradientTransformation(tx.init, tx.update)


@dataclass(frozen=True, eq=False)
class ScaleByQuadraticModel:
    """Hyperparameters of ``scale_by_quadratic_model``, and its two functions."""

    preconditioner: GradientTransformation
    damping: float | Tensor
    weight_decay: PerParameter
    kl_clip: float | Tensor | None
    gradient_decay: float | Tensor

    def __post_init__(self) -> None:
        check_number(self.damping, "damping", 0, includes_low=False)
        check_numbers(self.weight_decay, "weight_decay", 0)
        if self.kl_clip is not None:
            check_number(self.kl_clip, "kl_clip", 0, includes_low=False)
        check_number(self.gradient_decay, "gradient_decay", 0, 1)

    @property
    def decays(self) -> bool:
        """Whether a weight decay may differ from 0."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0

    def init(self, params: Tree) -> QuadraticModelState:
        """Return the state before the first step."""
        check_tree(params, "params")
        inner = self.preconditioner.init(params)
        if not preconditions(inner):
            raise ValueError(
                "preconditioner: nothing in it preconditions; pass precondition_by_fisher(layers) or a chain with it"
            )
        # Each with memory of its own, as in every later state, where they are picked among candidates: else a step is
        # compiled once more.
        inner = optree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), inner)
        last = torch.zeros_like(as_row(params))
        start = last.new_zeros(()) + self.damping
        since = torch.zeros_like(start, dtype=torch.int64)
        rate, momentum, predicted, ratio = (torch.zeros_like(start) for _ in range(4))
        dampings = start, start.clone()
        return QuadraticModelState(
            inner, last, last.clone(), *dampings, since, rate, momentum, predicted, ratio, since.clone()
        )

    def update(
        self,
        updates: Tree,
        state: QuadraticModelState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, QuadraticModelState]:
        """Return the step and the next state; see ``GradientTransformation``."""
        evaluation = check_evaluation(evaluation, "scale_by_quadratic_model")._replace(thin=False)
        check_state(state, QuadraticModelState)
        params = check_params(params, "scale_by_quadratic_model", updates)
        check_tree(params, "params")
        check_like(params, updates, "updates beside params")
        updates = materialize(updates)
        decay = of_leaves(self.weight_decay, params, "weight_decay")
        slope = as_row(add_scaled(updates, decay, params) if self.decays else updates)
        if slope.shape != state.last.shape:
            raise ValueError(
                f"state: expected one of {len(slope)} parameters, got one of {len(state.last)}; pass what init() or "
                "the last update() of this transformation returned"
            )
        sound = evaluation.loss.isfinite() & slope.isfinite().all()
        total = add_scaled(slope, self.gradient_decay, state.total)
        if evaluation.statistics is not None:
            evaluation = evaluation._replace(statistics=zero_unless(sound, evaluation.statistics))
        candidates, rows, inner = self._directions(total, state, params, evaluation, extra)
        minimum = self._minimum(rows, slope, total, state.damping, decay, params, evaluation)
        best = minimum.value.argmin(keepdim=True)
        rate, momentum, predicted, factor_damping = (_pick(x, best) for x in (*minimum, candidates))
        if evaluation.statistics is not None:
            inner = optree.tree_map(lambda x: _pick(x, best), inner)
        row = rate * _pick(rows[:-1], best) + momentum * rows[-1]
        step = from_row(row, params)
        accepted, ratio, damping = self._judged(step, predicted, state.damping, decay, params, evaluation)
        since = torch.zeros_like(state.since) if evaluation.statistics is not None else state.since + 1
        row, rejected = torch.where(accepted, row, 0), state.rejected + ~accepted
        numbers = rate, momentum, predicted, ratio, rejected
        new = QuadraticModelState(inner, row, total, damping, factor_damping, since, *numbers)
        return optree.tree_map(lambda x: torch.where(accepted, x, 0), step), selected(sound, new, state)

    def _directions(
        self, total: Tensor, state: QuadraticModelState, params: Tree, evaluation: Evaluation, extra: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Any]:
        """Return candidates for the factors' damping ``[k]``, their directions and the last update as rows
        ``[k + 1, P]``, and the preconditioner's states, stacked where there are statistics.
        """
        gradient = from_row(total, params)

        def precondition(factor_damping: Tensor) -> tuple[Tensor, Any]:
            natural, inner = self.preconditioner.update(
                gradient, state.preconditioner, params, evaluation=evaluation, factor_damping=factor_damping, **extra
            )
            return -as_row(natural), inner

        if evaluation.statistics is None:
            direction, inner = precondition(state.factor_damping)
            return state.factor_damping[None], torch.stack([direction, state.last]), inner
        change = ADAPTATION ** (state.since + 1).to(state.damping.dtype)
        around = torch.stack([1 / change, torch.ones_like(change), change])
        candidates = (state.factor_damping * around).clamp(SMALLEST, LARGEST)
        directions, inner = vmap(precondition)(candidates)
        return candidates, torch.cat([directions, state.last[None]]), inner

    def _minimum(
        self,
        rows: Tensor,
        slope: Tensor,
        total: Tensor,
        damping: Tensor,
        decay: PerParameter,
        params: Tree,
        evaluation: Evaluation,
    ) -> Minimum:
        """Return the model's minimum for each direction, shortened where ``kl_clip`` binds."""
        gram = evaluation.gram(vmap(lambda row: from_row(row, params))(rows)).to(rows.dtype)
        if is_number(decay):
            curvature = gram + (damping + decay) * (rows @ rows.mT)
        else:
            each = optree.tree_map(lambda p, one: torch.zeros_like(p) + one, params, decay)
            curvature = gram + ((damping + as_row(each)) * rows) @ rows.mT
        slopes = rows @ slope
        minimum = least(curvature, slopes)
        if self.kl_clip is None:
            return minimum
        return shortened(self.kl_clip, minimum, gram, curvature, slopes, rows[:-1] @ total)

    def _judged(
        self,
        step: Tree,
        predicted: Tensor,
        damping: Tensor,
        decay: PerParameter,
        params: Tree,
        evaluation: Evaluation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether the batch's loss accepts the step, the reduction ratio, and the next damping (section 6.5)."""
        moved = apply_updates(params, step)
        before, after = evaluation.loss, evaluation.loss_at(moved)
        if self.decays:
            before, after = before + _penalty(decay, params), after + _penalty(decay, moved)
        rounding = 16 * torch.finfo(after.dtype).eps * before.abs()
        accepted = after - before <= rounding  # false where one of them is not finite
        ratio = (after - before).to(predicted.dtype) / predicted.clamp(max=-torch.finfo(predicted.dtype).tiny)
        one = torch.ones_like(ratio)
        factor = torch.where(ratio > GOOD, ADAPTATION * one, torch.where(ratio < POOR, one / ADAPTATION, one))
        factor = torch.where(accepted, factor, RAISED * one)
        return accepted, ratio, (damping * factor).clamp(SMALLEST, LARGEST)


def _penalty(decay: PerParameter, params: Tree) -> Tensor:
    """Return ``½ η ‖θ‖²``."""
    return 0.5 * decay * vdot(params, params) if is_number(decay) else 0.5 * vdot(params, params, decay)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[index]`` for an index ``[1]``, without asking for its value."""
    return x.index_select(0, index)[0]
