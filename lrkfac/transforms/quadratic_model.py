"""Step size, momentum and damping from the quadratic model of the loss (Martens & Grosse 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.packing import Rows, accumulated, as_rows, cleared_unless, combined, disposable, from_rows
from lrkfac.core.base.per_parameter import check_numbers, of_leaves
from lrkfac.core.base.stacks import pick, picked
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import add_scaled, all_squarable, materialize, selected, zero_unless
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_params,
    check_state,
    check_transformation,
    preconditions,
)
from lrkfac.transforms.quadratic_batch import BatchModel

ADAPTATION = 0.95
"""Factor by which a damping may change per step: ``ω₁ = (19/20)^T₁`` of section 6.5, per step."""
RAISED = 4.0
"""Factor by which an undone step raises the damping."""
GOOD, POOR = 0.75, 0.25
"""Reduction ratios above and below which the damping falls and rises (section 6.5)."""
SMALLEST, LARGEST = 1e-10, 1e8
"""Bounds of both dampings: within them, no product with a float32 curvature underflows or overflows."""


LONGEST = 20
"""Steps of which one change of the damping makes up for at most, where statistics are rarer."""


class QuadraticModelState(NamedTuple):
    """State of ``scale_by_quadratic_model``; tensors ``[]`` but for the first three.

    Attributes:
        preconditioner: State of the preconditioner.
        last: Last update, a tuple of rows: one of all parameters with fewer than 65536 entries, one for each other.
        total: Decaying sum of the gradients, in such rows.
        damping: ``λ`` of the quadratic model.
        factor_damping: ``γ`` of the preconditioner, the product of the two factors' dampings.
        since: Steps since the last statistics; int64.
        learning_rate: ``α`` of the last step.
        momentum: ``μ`` of the last step.
        predicted: Change of the loss that the model predicted for the last step, at most 0.
        reduction_ratio: Change of the loss that came about, over the predicted one, in the last step with statistics.
        rejected: Number of steps that were undone; int64.
        failures: Number of the last evaluations in a row that were not finite; int64.
    """

    preconditioner: Any
    last: Rows
    total: Rows
    damping: Tensor
    factor_damping: Tensor
    since: Tensor
    learning_rate: Tensor
    momentum: Tensor
    predicted: Tensor
    reduction_ratio: Tensor
    rejected: Tensor
    failures: Tensor


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
    * a step that is not finite, or whose model is not, is not taken. A batch whose loss or gradient is not finite
      changes nothing, nor one of whose gradient the square is not (entries above 1.8e16 in float32).

    Where ``evaluation`` has statistics, every five steps or so,

    * the batch's loss at the new parameters judges the model: where it fell by more than 3/4 of the prediction, the
      damping ``λ`` falls; by less than 1/4, it rises (Levenberg and Marquardt), by as much as for all steps since the
      last statistics, up to 20. A step after which that loss is higher, or not finite, is undone, and the damping
      rises;
    * the preconditioner runs with three dampings ``γ`` of its factors: its last one, a smaller and a larger. The one
      with the smallest ``M`` is kept.

    A step without statistics costs no forward pass. So the loss after it may be higher; where it is not finite, the
    next evaluations are not, either. The first of them may have a bad batch, and changes nothing; the second takes the
    last step back, to where a batch had a finite loss and gradient, and the damping rises.

    The result is an update, to be added to the parameters as it is.

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
        last, total = (tuple([torch.zeros_like(row) for row in as_rows(params)]) for _ in range(2))
        start = last[0].new_zeros((), dtype=widest(*[row.dtype for row in last])) + self.damping
        since, rejected, failures = (torch.zeros_like(start, dtype=torch.int64) for _ in range(3))
        rate, momentum, predicted, ratio = (torch.zeros_like(start) for _ in range(4))
        numbers = rate, momentum, predicted, ratio, rejected, failures
        return QuadraticModelState(inner, last, total, start, start.clone(), since, *numbers)

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
        decay = of_leaves(self.weight_decay, params, "weight_decay") if self.decays else None
        slope, spent = self._slope(updates, decay, params, state), disposable(updates)
        sound = all_squarable((0 * evaluation.loss, *slope))  # of a loss that is not finite, NaN
        kept = self.gradient_decay * torch.ones_like(state.damping)
        # Of a batch that is not finite nothing counts: what is computed with it is thrown away.
        if evaluation.statistics is not None:
            evaluation = evaluation._replace(statistics=zero_unless(sound, evaluation.statistics))
        total = accumulated(sound, slope, spent, kept, state.total)
        candidates, gradients, inner = self._gradients(total, state, params, evaluation, extra)
        left = [None if one else row for one, row in zip(spent, slope, strict=True)]
        model = BatchModel(evaluation, params, left, total, state.total, kept, decay, state.damping)
        minimum = model.minimum(gradients, state.last, self.kl_clip)
        best = minimum.value.argmin(keepdim=True)
        rate, momentum, predicted, factor_damping = pick(torch.stack([*minimum, candidates], dim=1), best).unbind()
        if evaluation.statistics is not None:
            inner = picked(inner, best)
        # Parameters at which no batch has a finite loss: the last step led there, and nobody looked.
        undone = ~sound & (state.failures > 0) & (state.since > 0)
        back = torch.where(undone, -torch.ones_like(momentum), 1)
        direction = tuple([pick(x, best) for x in gradients])
        row = combined(torch.where(sound, -rate, 0), direction, torch.where(sound, momentum, back), state.last)
        accepted, ratio, damping = self._judged(row, predicted, state, model)
        row = cleared_unless(accepted | ~sound, row)
        step = from_rows(tuple([x * (sound | undone) for x in row]), params)
        since = torch.zeros_like(state.since) if evaluation.statistics is not None else state.since + 1
        numbers = rate, momentum, predicted, ratio, state.rejected + ~accepted, torch.zeros_like(state.failures)
        after = QuadraticModelState(inner, row, total, damping, factor_damping, since, *numbers)
        return step, selected(sound, after, self._failed(row, total, undone, state))

    def _slope(self, updates: Tree, decay: PerParameter | None, params: Tree, state: QuadraticModelState) -> Rows:
        """Return the gradient of loss and penalty."""
        updates = materialize(updates)
        slope = as_rows(updates if decay is None else add_scaled(updates, decay, params))
        if [len(row) for row in slope] != [len(row) for row in state.last]:
            raise ValueError(
                f"state: expected one of {sum(map(len, slope))} parameters, got one of {sum(map(len, state.last))}; "
                "pass what init() or the last update() of this transformation returned"
            )
        return slope

    def _gradients(
        self, total: Rows, state: QuadraticModelState, params: Tree, evaluation: Evaluation, extra: dict[str, Any]
    ) -> tuple[Tensor, Rows, Any]:
        """Return candidates for the factors' damping ``[k]``, the gradients preconditioned with each, rows ``[k, n]``,
        and the preconditioner's states, stacked where there are statistics.
        """
        gradient = from_rows(total, params)

        def precondition(factor_damping: Tensor) -> tuple[Tree, Any]:
            return self.preconditioner.update(
                gradient, state.preconditioner, params, evaluation=evaluation, factor_damping=factor_damping, **extra
            )

        if evaluation.statistics is None:
            natural, inner = precondition(state.factor_damping)
            return state.factor_damping[None], tuple([row[None] for row in as_rows(natural)]), inner
        change = ADAPTATION ** (state.since + 1).to(state.damping.dtype)
        around = torch.stack([1 / change, torch.ones_like(change), change])
        candidates = (state.factor_damping * around).clamp(SMALLEST, LARGEST)
        naturals, inner = vmap(precondition)(candidates)
        return candidates, as_rows(naturals, stacked=True), inner

    def _judged(
        self, row: Rows, predicted: Tensor, state: QuadraticModelState, model: BatchModel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether a step is accepted, the reduction ratio, and the next damping (section 6.5).

        By the batch's loss after the step where there are statistics, else by the model, which must be finite.
        """
        accepted, ratio, one = predicted.isfinite(), state.reduction_ratio, torch.ones_like(predicted)
        factor = one
        if model.evaluation.statistics is not None:
            before, after = model.change(from_rows(row, model.params))
            rounding = 16 * torch.finfo(after.dtype).eps * before.abs()
            accepted = accepted & (after - before <= rounding)  # false where one of them is not finite
            ratio = (after - before).to(predicted.dtype) / predicted.clamp(max=-torch.finfo(predicted.dtype).tiny)
            change = ADAPTATION ** (state.since + 1).clamp(max=LONGEST).to(one.dtype)
            factor = torch.where(ratio > GOOD, change, torch.where(ratio < POOR, one / change, one))
        factor = torch.where(accepted, factor, RAISED * one)
        return accepted, ratio, (state.damping * factor).clamp(SMALLEST, LARGEST)

    def _failed(self, row: Rows, total: Rows, undone: Tensor, state: QuadraticModelState) -> QuadraticModelState:
        """Return the state after a batch that is not finite."""
        raised = (RAISED * state.damping).clamp(SMALLEST, LARGEST)
        return state._replace(
            last=row,
            total=total,
            damping=torch.where(undone, raised, state.damping),
            since=torch.where(undone, 0, state.since),
            rejected=state.rejected + undone,
            failures=state.failures + 1,
        )
