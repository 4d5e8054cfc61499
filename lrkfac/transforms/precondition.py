"""Natural gradient: where the layers and the linear algebra meet."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.covariances import InputCovariance, from_matrix, output_covariance, split_groups, to_matrix
from lrkfac.core.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.operators import Kronecker
from lrkfac.core.structures import KroneckerStructure, kronecker
from lrkfac.core.tree import check_like, wide
from lrkfac.core.types import Evaluation, Layer, Layers, Statistics, Tree
from lrkfac.transforms.base import GradientTransformation, need_number


class PreconditionState(NamedTuple):
    """``factors``: the running averages, and ``inverses``: their damped inverses as of the last statistics,
    both by layer name; ``fallback``: the state of the transformation of all other parameters.
    """

    factors: dict[str, Any]
    inverses: dict[str, Kronecker]
    fallback: Any


def precondition_by_fisher(
    layers: Layers,
    structure: KroneckerStructure | Mapping[str, KroneckerStructure] | None = None,
    *,
    rank: int = 32,
    damping: float | Tensor = 1e-2,
    decay: float | Tensor = 0.95,
    fallback: GradientTransformation | None = None,
) -> GradientTransformation:
    """``(B + δ_B I)⁻¹ ∇W (A + δ_A I)⁻¹`` for each layer: natural gradient by K-FAC.

    Where ``evaluation`` has statistics, the running averages of the factors are updated and inverted anew;
    elsewhere the last inverses are applied. Before the first statistics gradients pass unchanged.

    Args:
        layers: From ``find_layers``.
        structure: How a layer's factors are held: one structure for all layers, or a mapping from patterns of
            layer names (``fnmatch``; the first that matches counts) to structures. A layer without a
            pattern, and every layer by default, is held as ``kronecker(low_rank(rank),
            low_rank_plus_diagonal(rank))``.
        rank: Rank of that default.
        damping: Tikhonov damping ``λ > 0``, in the square of the gradient's unit, split between the factors.
        decay: Decay of the running averages per batch of statistics, in [0, 1).
        fallback: Transformation of the parameters that no layer covers; by default they pass as plain
            gradients.

    Raises:
        ValueError: If ``rank`` is below 1, ``damping`` not positive and finite, ``decay`` outside [0, 1), or a
            pattern matches no layer; in ``update``, if the tree or the statistics are not those of ``layers``.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.
    """
    need_number(damping, "damping", 0, includes_low=False)
    need_number(decay, "decay", 0, 1)
    structures = _structures(layers, structure, rank)
    covered = layers.covered
    free = [p.index for p in layers.parameters if p.index not in covered]

    def leaves_of(tree: Tree, what: str) -> list[Tensor]:
        return check_like(layers.tree, tree, what)

    def init(params: Tree) -> PreconditionState:
        leaves = leaves_of(params, "params")
        factors = {layer.name: _init(layer, structures[layer.name], leaves) for layer in layers}
        inverses = {layer.name: _identity(layer, structures[layer.name], factors[layer.name]) for layer in layers}
        return PreconditionState(factors, inverses, fallback.init([leaves[i] for i in free]) if fallback else ())

    def update(
        updates: Tree,
        state: PreconditionState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, PreconditionState]:
        if evaluation is None:
            raise TypeError(
                "precondition_by_fisher: evaluation is missing; call "
                "update(evaluation.grads, state, params, evaluation=fisher(params, inputs, targets))"
            )
        leaves = leaves_of(updates, "updates")
        known = None if params is None else leaves_of(params, "params")
        factors, inverses = state.factors, state.inverses
        if evaluation.statistics is not None:
            refreshed = {
                layer.name: _refresh(
                    layer, structures[layer.name], factors[layer.name], evaluation.statistics, damping, decay
                )
                for layer in layers
            }
            factors = {name: factor for name, (factor, _) in refreshed.items()}
            inverses = {name: inverse for name, (_, inverse) in refreshed.items()}
        for layer in layers:
            bias = None if layer.bias is None else leaves[layer.bias.index]
            gradient = to_matrix(layer, leaves[layer.weight.index], bias)
            natural = _apply(layer, inverses[layer.name], gradient)
            leaves[layer.weight.index], new_bias = from_matrix(layer, natural)
            if layer.bias is not None and new_bias is not None:
                leaves[layer.bias.index] = new_bias
        other = state.fallback
        if fallback:
            own = None if known is None else [known[i] for i in free]
            changed, other = fallback.update([leaves[i] for i in free], other, own, evaluation=evaluation, **extra)
            for i, leaf in zip(free, changed, strict=True):
                leaves[i] = leaf
        new_updates = optree.tree_unflatten(optree.tree_structure(updates), leaves)
        return new_updates, PreconditionState(factors, inverses, other)

    return GradientTransformation(init, update)


def _structures(
    layers: Layers, structure: KroneckerStructure | Mapping[str, KroneckerStructure] | None, rank: int
) -> dict[str, KroneckerStructure]:
    default = kronecker(low_rank(rank), low_rank_plus_diagonal(rank))
    patterns = structure if isinstance(structure, Mapping) else {"*": default if structure is None else structure}
    names = [layer.name for layer in layers]
    for pattern, value in patterns.items():
        if not isinstance(value, KroneckerStructure):
            raise TypeError(
                f"structure: expected kronecker(input, output) for {pattern!r}, got {value!r}; a factor structure "
                "such as dense() stands inside it: kronecker(dense(), dense())"
            )
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"structure: the pattern {pattern!r} matches none of the layers {names}")
    chosen = {}
    for layer in layers:
        matching = (value for pattern, value in patterns.items() if fnmatchcase(layer.name, pattern))
        chosen[layer.name] = next(matching, default).fitted(layer.d_in, layer.d_out)
    return chosen


def _init(layer: Layer, structure: KroneckerStructure, leaves: list[Tensor]) -> Any:
    state = structure.init(layer.d_in, layer.d_out, leaves[layer.weight.index])
    if layer.groups == 1:
        return state
    return optree.tree_map(lambda x: x.expand(layer.groups, *x.shape).clone(), state)


def _identity(layer: Layer, structure: KroneckerStructure, state: Any) -> Kronecker:
    """The inverse before the first statistics: of factors that are zero, with damping 1."""

    def one_group(state: Any) -> Kronecker:
        return structure.inverse(state, 1.0)

    return one_group(state) if layer.groups == 1 else vmap(one_group)(state)


def _refresh(
    layer: Layer,
    structure: KroneckerStructure,
    state: Any,
    statistics: Statistics,
    damping: float | Tensor,
    decay: float | Tensor,
) -> tuple[Any, Kronecker]:
    """New averages and inverses of one layer, mapped over its groups."""
    if layer.source not in statistics.inputs:
        raise ValueError(
            f"evaluation: no statistics of layer {layer.name!r}; make fisher() and the transformation from the "
            "same layers"
        )

    def one_group(state: Any, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Any, Kronecker]:
        output = output_covariance(layer, gradients, statistics.scale)
        new = structure.update(state, output, InputCovariance(layer, inputs), decay)
        return new, structure.inverse(new, damping)

    inputs = split_groups(layer, statistics.inputs[layer.source])
    gradients = split_groups(layer, statistics.output_gradients[layer.source])
    try:
        return (one_group if layer.groups == 1 else vmap(one_group))(state, inputs, gradients)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"layer {layer.name!r}: no inverse of its factors: its statistics, or damping or decay where they are "
            f"tensors, are not finite or out of range ({error})"
        ) from error


def _apply(layer: Layer, inverse: Kronecker, gradient: Tensor) -> Tensor:
    def one_group(inverse: Kronecker, gradient: Tensor) -> Tensor:
        return inverse.two_sided(gradient)

    wide_gradient = wide(gradient)
    natural = (one_group if layer.groups == 1 else vmap(one_group))(inverse, wide_gradient)
    return natural.to(gradient.dtype)
