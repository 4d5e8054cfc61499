"""Step size, momentum and damping from the quadratic model of the loss (Martens & Grosse 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.packing import (
    Rows,
    accumulated,
    as_rows,
    cleared_unless,
    combined,
    disposable,
    from_rows,
    products,
)
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
from lrkfac.transforms.quadratic_damping import adapted, bounded, candidates, misled, raised
from lrkfac.transforms.quadratic_options import QuadraticModelOptions
from lrkfac.transforms.quadratic_state import Chosen, GradientNoise, QuadraticModelState, weights

DEFAULTS = QuadraticModelOptions()
CHOSEN = "gradient_decay", "learning_rate", "momentum", "predicted", "reduction_ratio"


def scale_by_quadratic_model(
    preconditioner: GradientTransformation,
    damping: float | Tensor = 0.1,
    weight_decay: PerParameter = 0.0,
    kl_clip: float | Tensor | None = None,
    gradient_decay: float | Tensor | None = 0.0,
    options: QuadraticModelOptions = DEFAULTS,
) -> GradientTransformation:
    """Return updates ``α Δ + μ δ₀`` that minimise the quadratic model of the batch's loss.

    ``Δ`` is the preconditioned descent direction, ``δ₀`` the last update. The model is
    ``M(δ) = ∇hᵀδ + ½ δᵀ(F + (λ + η) I)δ`` with the exact Fisher matrix ``F`` of the batch, weight decay ``η`` and
    ``h = loss + ½ η ‖θ‖²`` (Martens & Grosse 2015, arXiv 1503.05671, sections 6.4 to 6.6 and 7). In each step,

    * where ``evaluation`` has statistics, forward derivatives along both directions give the 2 × 2 system for ``α`` and
      ``μ``; in the steps between, one forward derivative along the step in the last proportion of ``α`` and ``μ`` gives
      its length;
    * a step that is not finite, or whose model is not, is not taken. A batch whose loss or gradient is not finite
      changes nothing, nor one of whose gradient the square is not (entries above 1.8e16 in float32).

    Where ``evaluation`` has statistics, every five steps or so,

    * the batch's loss at the new parameters judges the model: where it fell by more than 3/4 of the prediction, the
      damping ``λ`` falls, unless it makes up too little of the curvature to matter; by less than 1/4, it rises
      (Levenberg and Marquardt), by as much as for all steps since the last statistics, up to 20. A step after which
      that loss is higher, or not finite, is undone, and the damping rises;
    * the preconditioner runs with three dampings ``γ`` of its factors: its last one, a smaller and a larger. The one
      with the smallest ``M`` is kept. In the first of these steps they are orders of magnitude apart, and ``λ`` goes
      with them: dampings that start too large or too small have found their place after a few.

    A step without statistics costs no forward pass. So the loss after it may be higher; where it is not finite, the
    next evaluations are not, either. The first of them may have a bad batch, and changes nothing; the second takes the
    last step back, to where a batch had a finite loss and gradient, and the damping rises.

    The result is an update: add it to the parameters unchanged.

    Args:
        preconditioner: Such as ``precondition_by_fisher(layers)``, or a chain with one. It receives the damping
            ``γ`` as the extra ``factor_damping``; its own is not used.
        damping: Start of both dampings, positive, in the unit of ``F``.
        weight_decay: ``η``, in the unit of ``F``, within the model; or a tree of them, see ``add_decayed_weights``.
        kl_clip: Bound on ``δᵀ F δ``, the squared length of a step in the Fisher metric of the batch, and on that of
            ``α Δ`` in the preconditioner's metric; see ``clip_by_kl``. A longer step, or one with ``|μ| > 1``, is
            shortened. ``None`` for no bound: a batch unlike all others, such as one of another scale, then counts in
            full.
        gradient_decay: Decay of the sum ``Σ_k gradient_decay^k ∇h_{t-k}`` that is preconditioned, in [0, 1); 0
            preconditions the batch's own gradient. ``None``: it follows in each step from the noise of the gradients,
            and is the share of the slope of the last steps that the next batches did not see.
        options: How the dampings adapt and which steps are undone, see ``QuadraticModelOptions``.

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
    tx = ScaleByQuadraticModel(preconditioner, damping, weight_decay, kl_clip, gradient_decay, options)
    return GradientTransformation(tx.init, tx.update)


@dataclass(frozen=True, eq=False)
class ScaleByQuadraticModel:
    """Hyperparameters of ``scale_by_quadratic_model``, and its two functions."""

    preconditioner: GradientTransformation
    damping: float | Tensor
    weight_decay: PerParameter
    kl_clip: float | Tensor | None
    gradient_decay: float | Tensor | None
    options: QuadraticModelOptions

    def __post_init__(self) -> None:
        check_number(self.damping, "damping", 0, includes_low=False)
        check_numbers(self.weight_decay, "weight_decay", 0)
        if self.kl_clip is not None:
            check_number(self.kl_clip, "kl_clip", 0, includes_low=False)
        if self.gradient_decay is not None:
            check_number(self.gradient_decay, "gradient_decay", 0, 1)
        if not isinstance(self.options, QuadraticModelOptions):
            raise TypeError(f"options: expected QuadraticModelOptions, got {type(self.options).__name__}")

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
        zero = last[0].new_zeros((), dtype=widest(*[row.dtype for row in last]))
        start, count = bounded(self.options, zero + self.damping), torch.zeros_like(zero, dtype=torch.int64)
        noise = GradientNoise(*[zero.clone() for _ in range(4)])
        zeros = {name: zero.clone() for name in CHOSEN}
        counts = {name: count.clone() for name in ("since", "refreshes", "rejected", "failures")}
        return QuadraticModelState(inner, last, total, start, start.clone(), **zeros, **counts, noise=noise)

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
        kept = state.noise.share() if self.gradient_decay is None else self.gradient_decay + 0 * state.damping
        # Of a batch that is not finite nothing counts: what is computed with it is thrown away.
        if evaluation.statistics is not None:
            evaluation = evaluation._replace(statistics=zero_unless(sound, evaluation.statistics))
        total = accumulated(sound, slope, spent, kept, state.total)
        around, gradients, inner = self._gradients(total, state, params, evaluation, extra)
        left = [None if one else row for one, row in zip(spent, slope, strict=True)]
        model = BatchModel(evaluation, params, left, total, state.total, kept, decay, around[1])
        if evaluation.statistics is None:
            noise, minimum = state.noise, model.minimum_along(gradients, state.last, weights(state), self.kl_clip)
        else:
            minimum, fair = model.minimum(gradients, state.last, self.kl_clip)
            noise = state.noise.compared(fair)
        best = minimum.value.argmin(keepdim=True)
        chosen = Chosen(*pick(torch.stack([*minimum, *around], dim=1), best).unbind())
        if evaluation.statistics is not None:
            inner = picked(inner, best)
        # Parameters at which no batch has a finite loss: the last step led there, and nobody looked.
        undone = ~sound & (state.failures > 0) & (state.since > 0)
        rate = torch.where(sound, -chosen.rate, 0)
        momentum = torch.where(sound, chosen.momentum, torch.where(undone, -torch.ones_like(rate), 1))
        row = combined(rate, tuple([pick(x, best) for x in gradients]), momentum, state.last)
        accepted, judged = self._judged(row, chosen, noise, state, model)
        row = cleared_unless(accepted | ~sound, row)
        step = from_rows(tuple([x * (sound | undone) for x in row]), params)
        after = state._replace(
            preconditioner=inner,
            last=row,
            total=total,
            gradient_decay=kept,
            learning_rate=chosen.rate,
            momentum=chosen.momentum,
            predicted=chosen.value,
            rejected=state.rejected + ~accepted,
            failures=torch.zeros_like(state.failures),
            **judged,
        )
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
    ) -> tuple[tuple[Tensor, Tensor], Rows, Any]:
        """Return candidates for ``γ`` and ``λ``, ``[k]`` each, the gradients preconditioned with each, rows ``[k, n]``,
        and the preconditioner's states, stacked where there are statistics.
        """
        gradient = from_rows(total, params)

        def precondition(factor_damping: Tensor) -> tuple[Tree, Any]:
            return self.preconditioner.update(
                gradient, state.preconditioner, params, evaluation=evaluation, factor_damping=factor_damping, **extra
            )

        if evaluation.statistics is None:
            natural, inner = precondition(state.factor_damping)
            rows = tuple([row[None] for row in as_rows(natural)])
            return (state.factor_damping[None], state.damping[None]), rows, inner
        around = candidates(self.options, state)
        naturals, inner = vmap(precondition)(around[0])
        return around, as_rows(naturals, stacked=True), inner

    def _judged(
        self, row: Rows, chosen: Chosen, noise: GradientNoise, state: QuadraticModelState, model: BatchModel
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return whether a step is accepted, and what of the state follows from that.

        The batch's loss after the step judges where there are statistics, else the model, which must be finite.
        """
        accepted, damping = chosen.value.isfinite(), chosen.damping
        if model.evaluation.statistics is None:
            damping = torch.where(accepted, damping, raised(self.options, damping))
            return accepted, {"damping": damping, "since": state.since + 1, "noise": noise.stepped(chosen, accepted)}
        before, after = model.change(from_rows(row, model.params))
        change = (after - before).to(damping.dtype)
        rounding = 16 * torch.finfo(after.dtype).eps * before.abs()
        squares = products(row, row).to(damping.dtype)
        ratio = change / chosen.value.clamp(max=-torch.finfo(damping.dtype).tiny)
        back = misled(self.options, state, chosen, ratio)
        # Both are false where the loss is not finite, before or after.
        low = after - before <= rounding if self.options.reject else change.isfinite()
        accepted = accepted & low & ~back
        damping, factor_damping = adapted(self.options, state, chosen, ratio, squares, noise.share(), accepted, back)
        return accepted, {
            "damping": damping,
            "factor_damping": factor_damping,
            "since": torch.zeros_like(state.since),
            "refreshes": state.refreshes + 1,
            "reduction_ratio": ratio,
            "noise": noise.judged(chosen, squares, change, accepted).stepped(chosen, accepted),
        }

    def _failed(self, row: Rows, total: Rows, undone: Tensor, state: QuadraticModelState) -> QuadraticModelState:
        """Return the state after a batch that is not finite."""
        return state._replace(
            last=row,
            total=total,
            damping=torch.where(undone, raised(self.options, state.damping), state.damping),
            since=torch.where(undone, 0, state.since),
            rejected=state.rejected + undone,
            failures=state.failures + 1,
            noise=state.noise._replace(slope=torch.where(undone, 0, state.noise.slope)),
        )
