"""Natural gradient: where the layers and the linear algebra meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_dtype, check_flag, check_number
from lrkfac.core.base.dtypes import full_precision
from lrkfac.core.base.exchange import blank
from lrkfac.core.base.flags import flags_like
from lrkfac.core.base.layout import with_layout_of
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.leaves import tree_leaves, tree_structure, tree_unflatten
from lrkfac.core.base.processes import processes_of
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.replicas import Agreed
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import counter
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.assignment import Block, Chosen, blocks
from lrkfac.core.curvature.blocks import check_block_states, dtype_of, facts_of, initial_state, signatures
from lrkfac.core.curvature.damping import balanced_dampings
from lrkfac.core.curvature.owners import Division, Owners, check_division, owners_of
from lrkfac.core.curvature.precondition import alike, natural_gradients
from lrkfac.core.curvature.ranks import AutoRank, resolved
from lrkfac.core.curvature.refresh import due_blocks, refresh
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.layers.statistics import Statistics
from lrkfac.transforms.base import GradientTransformation, check_evaluation, check_state, check_transformation
from lrkfac.transforms.precondition_state import PreconditionState


def precondition_by_fisher(
    layers: Layers,
    structure: Chosen = None,
    *,
    rank: AutoRank | None = None,
    damping: float | Tensor = 0.03,
    decay: float | Tensor = 0.95,
    fallback: GradientTransformation | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    balanced: bool = False,
    owners: Any = None,
) -> GradientTransformation:
    """Precondition each layer's gradient, ``(B + δ_B I)⁻¹ ∇W (A + δ_A I)⁻¹``: natural gradient by K-FAC.

    If ``evaluation`` has statistics, the running averages are updated and inverted again. Otherwise the last
    inverses are applied. Before the first statistics gradients pass unchanged.

    Args:
        layers: From ``find_layers``.
        structure: How to represent a layer's block: one structure for all layers, a mapping from patterns of layer
            names (``fnmatch``; the first that matches counts), or a function of the ``Layer``; ``None`` from it, or no
            pattern, means the default ``kronecker(low_rank(rank), low_rank_plus_diagonal(rank))``. Also
            ``layer_wise()``, ``unit_wise()``, ``diagonal()``, and ``full()`` for all layers together. Scales and
            shifts, whose blocks are no products, are ``unit_wise()`` unless a pattern or function says otherwise; the
            one-hot side of an embedding is always the diagonal that it is.
        rank: Rank of that default, 32 unless given: an integer, a mapping from patterns of layer names to integers, or
            ``"auto"``: the largest common to all layers with which the state takes no more memory than the averages of
            Adam, if both are of one dtype, and at most 64. It is fixed when the transformation is made. See ``explain``
            for a budget in bytes and ``ranks_by_trace`` for ranks by what eigenpairs hold.
        damping: Tikhonov damping ``λ > 0``, in the gradient's unit squared, split between the factors.
        decay: Decay of the running averages per batch of statistics, in [0, 1).
        fallback: Transformation of the parameters that no layer covers; by default they pass as plain
            gradients.
        dtype: Of statistics, factors and inverses, float32 or float64: by default float64 if a layer's parameters are,
            else float32. Updates have the dtype of the gradients, whatever it is.
        differentiable: Whether derivatives through an update (``torch.func.grad``) go through the statistics, too.
            By default these are constants, and derivatives those with respect to gradient, damping and learning rate.
            With it, a low-rank factor must be of full rank, with distinct eigenvalues, for a derivative to exist.
        balanced: Whether blocks that are smaller by orders of magnitude are damped less, by the last averages: with
            ``damping (s / max s)^p``, at least a millionth of ``damping``, for a block of mean eigenvalue ``s``, where
            ``p`` rises from 0 to 1 while ``max s / min s`` does from 1000 to 3200. Queries and keys of a transformer
            start with millionths of the curvature of other layers: what is a small damping to these leaves those with
            plain gradients.
        owners: A process group, or a ``DeviceMesh`` with one axis, among whose processes layers are divided: each has
            one owner, and only it has the state and preconditions the gradient; updates are then gathered. The group is
            that of ``evaluator(..., group=)``, best with ``scatter=True``. It pays for dense factors of some hundred
            rows on; low-rank ones are applied about as fast as updates are gathered. By default all have all states.

    Returns:
        A transformation with a ``PreconditionState``. Its ``update`` takes the extra ``evaluation``, and
        ``factor_damping`` in the place of ``damping``.

    Raises:
        ValueError: If ``rank`` is below 1 or no layer takes it, ``damping`` not positive and finite, ``decay`` outside
            [0, 1), a pattern decides for no layer, a structure makes no sense for a layer, or ``dtype`` is another; in
            ``update``, if the tree, the state or the statistics are not those of ``layers``, or the evaluation is not
            one of the processes of ``owners``.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = torch.eye(3), torch.randn(8, 3), torch.randint(3, (8,))
        >>> model = lambda p, x: x @ p.T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> tx = lrkfac.precondition_by_fisher(layers, damping=0.1)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")(params, x, y)
        >>> updates, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> lrkfac.materialize(updates).shape
        torch.Size([3, 3])
    """
    check_layers(layers)
    check_flag(differentiable, "differentiable")
    check_flag(balanced, "balanced")
    if fallback is not None:
        check_transformation(fallback, "fallback")
    if dtype is not None:
        check_dtype(dtype)
    assigned = blocks(layers, structure, resolved(layers, structure, rank))
    processes = None if owners is None else processes_of(owners, "owners")
    divided = None if processes is None or processes.size == 1 else owners_of(assigned, processes)
    preconditioner = _Preconditioner(
        layers=layers,
        blocks=assigned,
        alike=alike([block for block in assigned if divided is None or divided.own(block)]),
        signatures=signatures(assigned, layers),
        uncovered=[p.index for p in layers.parameters if p.index not in layers.covered],
        damping=damping,
        decay=decay,
        fallback=fallback,
        dtype=dtype,
        differentiable=differentiable,
        balanced=balanced,
        owners=divided,
    )
    return GradientTransformation(preconditioner.init, preconditioner.update)


@dataclass(frozen=True, eq=False)
class _Preconditioner:
    """See ``precondition_by_fisher``, whose arguments these are, with what follows from them.

    Attributes:
        blocks: Layers with their structures.
        alike: Blocks of this process that may be joined.
        signatures: Of each block's average.
        uncovered: Indices of the parameters that no layer covers.
        owners: Of the blocks, or ``None`` where all processes have all states.
        agreed: Whether processes have been found to have the same blocks and numbers.
    """

    layers: Layers
    blocks: tuple[Block, ...]
    alike: list[list[Block]]
    signatures: dict[str, Any]
    uncovered: list[int]
    damping: float | Tensor
    decay: float | Tensor
    fallback: GradientTransformation | None
    dtype: torch.dtype | None
    differentiable: bool
    balanced: bool
    owners: Owners | None
    agreed: Agreed | None = field(default_factory=Agreed.new, repr=False)

    def __post_init__(self) -> None:
        check_number(self.damping, "damping", 0, includes_low=False)
        check_number(self.decay, "decay", 0, 1)

    def init(self, params: Tree) -> PreconditionState:
        """Return the state before the first statistics, with which gradients pass unchanged."""
        leaves = self._leaves(params, "params")
        states = {
            block.name: initial_state(block, leaves, self.dtype) if self._own(block) else () for block in self.blocks
        }
        other = self.fallback.init([leaves[i] for i in self.uncovered]) if self.fallback else ()
        return PreconditionState(states, counter(leaves).repeat(len(states)), other)

    def update(
        self,
        updates: Tree,
        state: PreconditionState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        factor_damping: float | Tensor | None = None,
        **extra: Any,
    ) -> tuple[Tree, PreconditionState]:
        """Return the preconditioned updates, after a refresh where the evaluation has statistics."""
        evaluation = check_evaluation(evaluation, "precondition_by_fisher")
        check_state(state, PreconditionState)
        leaves: list[Any] = self._leaves(self.owners.collected(updates) if self.owners else updates, "updates")
        dtypes = {block.name: self.dtype or dtype_of(block, leaves) for block in self.blocks}
        self._check_states(evaluation, state.blocks, dtypes)
        param_leaves = None if params is None else self._leaves(params, "params")
        states, since = state.blocks, state.since + 1
        damping = self.damping if factor_damping is None else factor_damping
        if evaluation.statistics is not None:
            states = self._refreshed(state, evaluation, damping, dtypes)
            since = self._since(since, evaluation.statistics)
        with profiled("apply"), full_precision(since):
            for i, natural in self._natural(states, leaves, since, damping).items():
                leaf = with_layout_of(natural, leaves[i])
                # Scaled and added to in fewer passes over memory, at the end of the chain.
                waits = evaluation.thin and isinstance(leaf, Tensor) and leaf.ndim == 2
                leaves[i] = LazyMatrix.of(leaf) if waits else leaf
        other = state.fallback
        if self.fallback:
            rest = None if param_leaves is None else [param_leaves[i] for i in self.uncovered]
            rest_updates = [leaves[i] for i in self.uncovered]
            changed, other = self.fallback.update(rest_updates, other, rest, evaluation=evaluation, **extra)
            for i, leaf in zip(self.uncovered, changed, strict=True):
                leaves[i] = leaf
        new_updates = tree_unflatten(tree_structure(updates), leaves)
        return new_updates, PreconditionState(states, since, other)

    def _refreshed(
        self,
        state: PreconditionState,
        evaluation: Evaluation,
        damping: float | Tensor,
        dtypes: dict[str, torch.dtype],
    ) -> dict[str, Any]:
        states, statistics = state.blocks, evaluation.statistics
        assert statistics is not None
        if not self.differentiable:
            statistics = optree.tree_map(Tensor.detach, statistics)
        division = None
        if self.owners is not None:
            mapped = blank(state.since, self.decay, *tree_leaves(statistics))
            division = Division(self.owners, dtypes, mapped)
        with profiled("refresh"), full_precision(statistics.scale):
            even: dict[str, Any] = dict.fromkeys(states, damping)
            dampings = balanced_dampings(self.blocks, states, damping, division) if self.balanced else even
            return refresh(self.blocks, states, statistics, dampings, self.decay, evaluation.among, division)

    def _natural(
        self, states: dict[str, Any], leaves: list[Any], since: Tensor, damping: float | Tensor
    ) -> dict[int, Any]:
        """Return the natural gradients of all covered parameters, by index."""
        natural = natural_gradients(self.alike, states, leaves)
        return natural if self.owners is None else self.owners.gathered(natural, leaves, blank(since, damping, *leaves))

    def _since(self, steps: Tensor, statistics: Statistics) -> Tensor:
        """Return the steps, 0 where a block has been refreshed."""
        due = {block.name for block in due_blocks(self.blocks, statistics)}
        unchanged = [name not in due for name in sorted(block.name for block in self.blocks)]
        return steps * flags_like(unchanged, steps) if any(unchanged) else torch.zeros_like(steps)

    def _own(self, block: Block) -> bool:
        return self.owners is None or self.owners.own(block)

    def _check_states(self, evaluation: Evaluation, states: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
        """Raise unless states are those of this process' blocks, and processes have the same blocks and numbers."""
        expected = self.signatures
        if self.owners is not None:
            check_division(self.owners, evaluation.among, states)
            expected, states = self.owners.own_part(expected), self.owners.own_part(states)
        check_block_states(expected, states, dtypes)
        if evaluation.among is not None and self.agreed is not None:
            self.agreed.check("precondition_by_fisher", self._facts, evaluation.among.processes)

    def _facts(self) -> dict[str, Any]:
        """Return what processes must have in common, by name."""
        facts = facts_of(self.blocks, self.signatures, damping=self.damping, decay=self.decay)
        return facts | (self.owners.facts() if self.owners else {})

    def _leaves(self, tree: Tree, what: str) -> list[Any]:
        return check_like(self.layers.tree, tree, what)
