"""A block of the Fisher matrix: some layers and what holds them. Here the capture and the linear algebra meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.corrected import CorrectedStructure
from lrkfac.core.covariances import Uses, example_gradients, factors, split_groups
from lrkfac.core.examples import ExampleGradients
from lrkfac.core.factors import DiagonalStructure, FactorStructure, diagonal
from lrkfac.core.kronecker import KroneckerStructure
from lrkfac.core.layers import KINDS
from lrkfac.core.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.profiling import profiled
from lrkfac.core.structures import BlockStructure, ProductStructure, Structure, kronecker, unit_wise
from lrkfac.core.tree import formed, wide
from lrkfac.core.types import Layer, Layers, Statistics
from lrkfac.core.unformed import Unformed

Choice = Structure | FactorStructure
Chosen = Choice | Mapping[str, Choice] | Callable[[Layer], Choice | None] | None


class Block(NamedTuple):
    """Layers held together, by their one structure; one layer, but for ``full``; ``implied`` if nobody chose it."""

    name: str
    layers: tuple[Layer, ...]
    structure: Structure
    implied: bool = False


RANK = 32
"""Rank of the default structure."""


def blocks(layers: Layers, structure: Chosen, rank: int | None) -> tuple[Block, ...]:
    """Which structure holds which layer.

    Args:
        layers: From ``find_layers``.
        structure: One for all, a mapping from patterns of names, or a function of the layer; see
            ``precondition_by_fisher``.
        rank: Of the default; ``None`` means ``RANK``.

    Raises:
        ValueError: If a pattern decides for no layer, a structure makes no sense for a layer, or ``rank`` is given
            and no layer is left to the default.
        TypeError: If something is no structure.
    """
    default = _default(RANK) if rank is None else _default(rank)
    if isinstance(structure, BlockStructure) and structure.per == "model":
        if rank is not None:
            raise ValueError(_NO_DEFAULT.format(rank=rank))
        for layer in layers:
            _need_examples(layer)
        whole = sum(layer.groups * layer.d_out * layer.d_in for layer in layers)
        return (Block("", tuple(layers), structure.fitted(1, whole)),)
    if isinstance(structure, Mapping):
        _check_patterns(structure, [layer.name for layer in layers])
    found, takes_default = [], structure is None
    for layer in layers:
        chosen = _chosen(layer, structure)
        implied = chosen is None or (isinstance(structure, ProductStructure) and _unit_wise(layer))
        if implied:
            held: Structure = unit_wise() if _unit_wise(layer) else default
            takes_default = takes_default or held is default
        else:
            held = _checked(layer, chosen)
        if isinstance(held, CorrectedStructure) and any(KINDS[kind].one_hot for kind in layer.kinds):
            held = held.factors  # a basis of the one-hot side would be a square of the vocabulary
        if isinstance(held, KroneckerStructure) and layer.kind == "embedding":
            held = replace(held, output=diagonal())  # the one-hot side; with treatment="expand", exactly
        found.append(Block(layer.name, (layer,), held.fitted(layer.d_in, layer.d_out), implied))
    if rank is not None and not takes_default:
        raise ValueError(_NO_DEFAULT.format(rank=rank))
    return tuple(found)


_NO_DEFAULT = (
    "rank: the structure decides for every layer, so that no layer takes the default with rank={rank}; leave rank "
    "out, or give the structure that rank, as in kronecker(low_rank({rank}), low_rank_plus_diagonal({rank}))"
)


def _default(rank: int) -> ProductStructure:
    return kronecker(low_rank(rank), low_rank_plus_diagonal(rank))


def _check_patterns(structure: Mapping[str, Choice], names: list[str]) -> None:
    left = names
    for pattern in structure:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"structure: the pattern {pattern!r} matches none of the layers {names}")
        if not set(matched) & set(left):
            raise ValueError(
                f"structure: the pattern {pattern!r} decides for no layer: earlier patterns match {matched}, too; "
                "put it before them, the first that matches counts"
            )
        left = [name for name in left if name not in matched]


def _chosen(layer: Layer, structure: Chosen) -> Any:
    if isinstance(structure, Mapping):
        return next((value for pattern, value in structure.items() if fnmatchcase(layer.name, pattern)), None)
    if callable(structure):
        return structure(layer)
    return structure


def _unit_wise(layer: Layer) -> bool:
    return any(KINDS[kind].unit_wise for kind in layer.kinds)


def _checked(layer: Layer, structure: Any) -> Structure:
    if isinstance(structure, DiagonalStructure):
        structure = BlockStructure(structure, "layer")
    if isinstance(structure, BlockStructure | CorrectedStructure) or (
        isinstance(structure, KroneckerStructure) and structure.treatment == "reduce"
    ):
        _need_examples(layer)
    if isinstance(structure, ProductStructure) and _unit_wise(layer):
        raise ValueError(
            f"structure: layer {layer.name!r} is a {layer.kind}, whose block is no Kronecker product; use unit_wise(), "
            "layer_wise() or diagonal()"
        )
    if isinstance(structure, BlockStructure) and structure.per == "model":
        raise ValueError(f"structure: full() holds all layers together and cannot stand for {layer.name!r} alone")
    if not isinstance(structure, Structure):
        raise TypeError(
            f"structure: expected kronecker(input, output), unit_wise(), layer_wise() or diagonal() for layer "
            f"{layer.name!r}, got {structure!r}; a factor structure such as dense() stands inside: "
            "kronecker(dense(), dense())"
        )
    return structure


def _need_examples(layer: Layer) -> None:
    if not layer.batched:
        raise ValueError(
            f"structure: layer {layer.name!r} is used where the batch is not the leading axis: the gradients of "
            'single examples are not known; use kronecker(...) with treatment="expand", uncorrected, for it, or write '
            "the batch as the leading axis"
        )


def init(block: Block, leaves: list[Tensor]) -> Any:
    """The averages before the first statistics."""
    layer = block.layers[0]
    like = leaves[layer.weight.index]
    if _per_model(block):
        whole = sum(one.groups * one.d_out * one.d_in for one in block.layers)
        return block.structure.init(1, whole, like)
    state = block.structure.init(layer.d_in, layer.d_out, like)
    if layer.groups == 1:
        return state
    return optree.tree_map(lambda x: x.expand(layer.groups, *x.shape).clone(), state)


def form(state: Any) -> Any:
    """What tells states apart: types, names and shapes, in nested tuples."""
    if isinstance(state, Tensor):
        return tuple(state.shape)
    inner = tuple([form(part) for part in state]) if isinstance(state, tuple) else ()
    return (type(state).__name__, *inner)


def forms(held: tuple[Block, ...], layers: Layers) -> dict[str, Any]:
    """The form of each block's averages."""
    leaves = [torch.empty(parameter.shape, device="meta") for parameter in layers.parameters]
    return {block.name: form(init(block, leaves)) for block in held}


def check_state(expected: Mapping[str, Any], factors: Any) -> None:
    """Refuses averages of other blocks.

    Raises:
        ValueError: Names the layer that is missing, unexpected or held in another way.
    """
    remedy = "pass what init() or the last update() of this transformation returned"
    if not isinstance(factors, dict) or set(factors) != set(expected):
        names = sorted(factors) if isinstance(factors, dict) else type(factors).__name__
        raise ValueError(f"state: expected averages of the layers {sorted(expected)}, got {names}; {remedy}")
    for name, wanted in expected.items():
        found = form(factors[name])
        if found != wanted:
            raise ValueError(f"state: expected averages of layer {name!r} in the form {wanted}, got {found}; {remedy}")


def identity(block: Block, state: Any) -> Any:
    """The inverse before the first statistics: of averages that are zero, with damping 1."""
    return _by_group(block, lambda one: block.structure.inverse(one, 1.0))(state)


def refresh(
    block: Block, state: Any, inverse: Any, statistics: Statistics, damping: float | Tensor, decay: float | Tensor
) -> tuple[Any, Any]:
    """New averages and their inverses; the last ones of a scale or shift where there are no output gradients.

    Normalised inputs have the second moment 1: with ``B = I``, the identity is what the block of a scale would be.

    Raises:
        ValueError: If the statistics are those of other layers, or have no gradients where the structure needs them.
    """
    for layer in block.layers:
        if layer.name not in statistics.inputs:
            raise ValueError(
                f"evaluation: no statistics of layer {layer.name!r}; make fisher() and the transformation from the "
                "same layers"
            )
    structure, scale = block.structure, statistics.scale
    exact = not isinstance(structure, KroneckerStructure)
    if exact and not statistics.output_gradients[block.layers[0].name]:
        if block.implied:
            return state, inverse
        held = "an exact" if isinstance(structure, BlockStructure) else "a corrected"
        raise ValueError(
            f"structure: layer {block.layers[0].name!r} is held by {held} block, which needs the "
            'gradients at the layer\'s outputs: the estimator "forward_only" takes none; use kronecker(...), '
            "uncorrected, or another estimator"
        )
    if _per_model(block):
        assert isinstance(structure, BlockStructure)
        rows = [_example_rows(layer, statistics).flatten(1) for layer in block.layers]
        new = structure.update(state, torch.cat(rows, dim=1)[:, :, None], scale, decay)
        with profiled("inverse"):
            return new, structure.inverse(new, damping)
    (layer,) = block.layers
    inputs = split_groups(layer, statistics.inputs[layer.name])
    gradients = split_groups(layer, statistics.output_gradients[layer.name])

    def one_group(state: Any, inputs: Uses, gradients: Uses) -> tuple[Any, Any]:
        if isinstance(structure, KroneckerStructure):
            both = factors(layer, inputs, gradients, scale, structure.treatment)
            new: Any = structure.update(state, *both, decay)
        elif isinstance(structure, CorrectedStructure):
            both = factors(layer, inputs, gradients, scale, structure.factors.treatment)
            new = structure.update(state, *both, ExampleGradients(layer, inputs, gradients, scale), decay)
        else:
            rows = example_gradients(layer, inputs, gradients).flatten(0, 1)
            new = structure.update(state, rows, scale.to(rows.dtype), decay)
        with profiled("inverse"):
            return new, structure.inverse(new, damping)

    try:
        return _by_group(block, one_group)(state, inputs, gradients)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"layer {layer.name!r}: no inverse of its factors: its statistics, or damping or decay where they are "
            f"tensors, are not finite or out of range ({error})"
        ) from error


def apply(block: Block, inverse: Any, matrices: list[Any]) -> list[Any]:
    """The layers' natural gradients as matrices, from their gradients as matrices, in the dtype of these.

    A gradient that is held by its rows stays so where the block is a Kronecker product.
    """
    if not isinstance(block.structure, KroneckerStructure):
        matrices = formed(matrices)
    if _per_model(block):
        flat = torch.cat([wide(matrix).reshape(-1) for matrix in matrices])
        parts = inverse.matvec(flat).split([matrix.numel() for matrix in matrices])
        return [part.reshape(m.shape).to(m.dtype) for part, m in zip(parts, matrices, strict=True)]
    (matrix,) = matrices
    natural = _by_group(block, block.structure.apply)(inverse, wide(matrix))
    return [natural if isinstance(natural, Unformed) else natural.contiguous().to(matrix.dtype)]


def _per_model(block: Block) -> bool:
    return isinstance(block.structure, BlockStructure) and block.structure.per == "model"


def _by_group(block: Block, function: Callable[..., Any]) -> Callable[..., Any]:
    if _per_model(block) or block.layers[0].groups == 1:
        return function
    # Contiguous, whatever vmap returns: a compiled update is compiled again where a state's strides change.
    return lambda *args: optree.tree_map(lambda x: x.contiguous(), vmap(function)(*args))


def _example_rows(layer: Layer, statistics: Statistics) -> Tensor:
    """Examples' gradients ``[k n, groups d_out d_in]`` of all groups of a layer."""
    inputs = split_groups(layer, statistics.inputs[layer.name])
    gradients = split_groups(layer, statistics.output_gradients[layer.name])
    if layer.groups == 1:
        return example_gradients(layer, inputs, gradients).flatten(0, 1)
    grouped = vmap(lambda a, g: example_gradients(layer, a, g))(inputs, gradients)
    return grouped.permute(1, 2, 0, 3, 4).flatten(0, 1)
