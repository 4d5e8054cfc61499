"""Natural gradient: where the layers and the linear algebra meet."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_dtype, check_flag, check_number
from lrkfac.core.base.dtypes import without_autocast
from lrkfac.core.base.layout import with_layout_of
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import counter
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.assignment import Chosen, blocks
from lrkfac.core.curvature.blocks import Held, check_averages, dtype_of, forms, identity, init
from lrkfac.core.curvature.damping import balanced_dampings
from lrkfac.core.curvature.precondition import alike, natural_gradients
from lrkfac.core.curvature.ranks import AutoRank, resolved
from lrkfac.core.curvature.refresh import refresh_all
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.transforms.base import GradientTransformation, check_evaluation, check_state, check_transformation


class PreconditionState(NamedTuple):
    """What is held between steps; the first three by layer name, with a leading axis for groups.

    Attributes:
        factors: The running averages.
        inverses: Their damped inverses as of the last statistics.
        dampings: What these have on top of the averages: ``δ_B`` and ``δ_A`` of a product, ``[2]``, else ``λ``, ``[]``.
        since: For each of these, sorted by name, the number of steps since its last statistics, int64 ``[n]``.
        fallback: The state of the transformation of all other parameters.
    """

    factors: dict[str, Any]
    inverses: dict[str, Any]
    dampings: dict[str, Any]
    since: Tensor
    fallback: Any

    @property
    def preconditions(self) -> bool:
        """Marks the state of a transformation that preconditions and takes the extra ``factor_damping``."""
        return True


def precondition_by_fisher(
    layers: Layers,
    structure: Chosen = None,
    *,
    rank: AutoRank | None = None,
    damping: float | Tensor = 1e-2,
    decay: float | Tensor = 0.95,
    fallback: GradientTransformation | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    balanced: bool = False,
) -> GradientTransformation:
    """``(B + δ_B I)⁻¹ ∇W (A + δ_A I)⁻¹`` for each layer: natural gradient by K-FAC, or by exact blocks.

    Where ``evaluation`` has statistics, the running averages are updated and inverted anew; elsewhere the last
    inverses are applied. Before the first statistics gradients pass unchanged.

    Args:
        layers: From ``find_layers``.
        structure: How a layer's block is held: one structure for all layers, a mapping from patterns of layer names
            (``fnmatch``; the first that matches counts), or a function of the ``Layer``; ``None`` from it, or no
            pattern, means the default ``kronecker(low_rank(rank), low_rank_plus_diagonal(rank))``. Also
            ``layer_wise()``, ``unit_wise()``, ``diagonal()``, and ``full()`` for all layers together. Scales and
            shifts, whose blocks are no products, are held ``unit_wise()`` unless a pattern or function says
            otherwise; the one-hot side of an embedding is always held as the diagonal that it is.
        rank: Rank of that default, 32 unless given: an integer, a mapping from patterns of layer names to integers, or
            ``"auto"``: the largest common to all layers with which the state takes no more memory than the averages of
            Adam, if both are of one dtype, and at most 64. It is fixed when the transformation is made. See ``explain``
            for a budget in bytes and ``ranks_by_trace`` for ranks by what eigenpairs hold.
        damping: Tikhonov damping ``λ > 0``, in the square of the gradient's unit, split between the factors.
        decay: Decay of the running averages per batch of statistics, in [0, 1).
        fallback: Transformation of the parameters that no layer covers; by default they pass as plain
            gradients.
        dtype: In which statistics are reduced, factors and inverses held and applied, float32 or float64: by default
            float64 if a layer's parameters are, else float32. Updates have the dtype of the gradients, whatever it is.
        differentiable: Whether derivatives through an update (``torch.func.grad``) go through the statistics, too.
            By default these are constants, and derivatives those with respect to gradient, damping and learning rate.
            With it, a factor held by eigenpairs must be of full rank, with distinct ones, for a derivative to exist.
        balanced: Whether blocks that are smaller by orders of magnitude are damped less, by the last averages: with
            ``damping (s / max s)^p``, at least a millionth of ``damping``, for a block of mean eigenvalue ``s``, where
            ``p`` rises from 0 to 1 while ``max s / min s`` does from 1000 to 3200. Queries and keys of a transformer
            start with millionths of the curvature of other layers: what is a small damping to these leaves those with
            plain gradients.

    Raises:
        ValueError: If ``rank`` is below 1 or no layer takes it, ``damping`` not positive and finite, ``decay`` outside
            [0, 1), a pattern decides for no layer, a structure makes no sense for a layer, or ``dtype`` is another; in
            ``update``, if the tree, the state or the statistics are not those of ``layers``.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.
    """
    check_layers(layers)
    check_number(damping, "damping", 0, includes_low=False)
    check_number(decay, "decay", 0, 1)
    check_flag(differentiable, "differentiable")
    check_flag(balanced, "balanced")
    if fallback is not None:
        check_transformation(fallback, "fallback")
    if dtype is not None:
        check_dtype(dtype)
    held = blocks(layers, structure, resolved(layers, structure, rank))
    expected = forms(held, layers)
    together = alike(held)
    covered = layers.covered
    free = [p.index for p in layers.parameters if p.index not in covered]

    def leaves_of(tree: Tree, what: str) -> list[Tensor]:
        return check_like(layers.tree, tree, what)

    def init_state(params: Tree) -> PreconditionState:
        leaves = leaves_of(params, "params")
        start = {block.name: identity(block, init(block, leaves, dtype)) for block in held}
        other = fallback.init([leaves[i] for i in free]) if fallback else ()
        return PreconditionState(*_by_part(start), counter(leaves).repeat(len(held)), other)

    def update(
        updates: Tree,
        state: PreconditionState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        factor_damping: float | Tensor | None = None,
        **extra: Any,
    ) -> tuple[Tree, PreconditionState]:
        evaluation = check_evaluation(evaluation, "precondition_by_fisher")
        statistics = evaluation.statistics
        check_state(state, PreconditionState)
        leaves: list[Any] = leaves_of(updates, "updates")
        check_averages(expected, state.factors, {block.name: dtype or dtype_of(block, leaves) for block in held})
        known = None if params is None else leaves_of(params, "params")
        if statistics is not None and not differentiable:
            statistics = optree.tree_map(torch.Tensor.detach, statistics)
        factors, inverses, dampings, since = state.factors, state.inverses, state.dampings, state.since + 1
        used = damping if factor_damping is None else factor_damping
        if statistics is not None:
            with profiled("refresh"), without_autocast(since):
                last = {block.name: Held(*[part[block.name] for part in state[:3]]) for block in held}
                each = balanced_dampings(held, state.factors, used) if balanced else dict.fromkeys(last, used)
                factors, inverses, dampings = _by_part(refresh_all(held, last, statistics, each, decay))
                since = _since(since, state.factors, factors)
        with profiled("apply"), without_autocast(since):
            for i, found in natural_gradients(together, inverses, leaves).items():
                leaf = with_layout_of(found, leaves[i])
                # Scaled and added to in fewer passes over memory, at the end of the chain.
                waits = evaluation.thin and isinstance(leaf, Tensor) and leaf.ndim == 2
                leaves[i] = LazyMatrix.of(leaf) if waits else leaf
        other = state.fallback
        if fallback:
            own = None if known is None else [known[i] for i in free]
            changed, other = fallback.update([leaves[i] for i in free], other, own, evaluation=evaluation, **extra)
            for i, leaf in zip(free, changed, strict=True):
                leaves[i] = leaf
        new_updates = optree.tree_unflatten(optree.tree_structure(updates), leaves)
        return new_updates, PreconditionState(factors, inverses, dampings, since, other)

    return GradientTransformation(init_state, update)


def _since(steps: Tensor, before: dict[str, Any], after: dict[str, Any]) -> Tensor:
    """The steps, 0 where a block has been refreshed."""
    left = [after[name] is before[name] for name in sorted(after)]
    return steps * torch.tensor(left, device=steps.device) if any(left) else torch.zeros_like(steps)


def _by_part(found: dict[str, Held]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Averages, inverses and dampings, each by name."""
    states, inverses, dampings = ({name: held[i] for name, held in found.items()} for i in range(3))
    return states, inverses, dampings
