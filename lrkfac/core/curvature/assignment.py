"""The assignment of structures to layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lrkfac.core.curvature.exact import ExactStructure, unit_wise
from lrkfac.core.curvature.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.curvature.protocol import BlockStructure, FactorStructure
from lrkfac.core.curvature.structures import kronecker
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import KINDS

Choice = BlockStructure | FactorStructure


Chosen = Choice | Mapping[str, Choice] | Callable[[Layer], Choice | None] | None


Rank = int | Mapping[str, int]


class Block(NamedTuple):
    """A block of the Fisher matrix: its layers, one but for ``full``, and the structure that represents it.

    Attributes:
        name: Of the layer; ``""`` where one block holds all layers.
        layers: Of the block.
        structure: How it is represented.
        implied: Whether the structure is the default, which nobody chose.
    """

    name: str
    layers: tuple[Layer, ...]
    structure: BlockStructure
    implied: bool = False


RANK = 32
"""Rank of the default structure."""


def blocks(layers: Layers, structure: Chosen, rank: Rank | None) -> tuple[Block, ...]:
    """Return the blocks of layers, each with its structure.

    Args:
        layers: From ``find_layers``.
        structure: One for all, a mapping from patterns of names, or a function of the layer; see
            ``precondition_by_fisher``.
        rank: Of the default, or a mapping from patterns of names to ranks; ``None``, and no pattern, means ``RANK``.

    Raises:
        ValueError: If a pattern decides for no layer, a structure makes no sense for a layer, or ``rank`` is given
            and no layer is left to the default.
        TypeError: If something is no structure.
    """
    ranks = ranks_of(layers, RANK if rank is None else rank)
    if not len(layers):
        if isinstance(structure, Mapping):
            _check_patterns("structure", structure, [])
        return ()
    if isinstance(structure, BlockStructure) and structure.joins_layers:
        if rank is not None:
            raise ValueError(_NO_DEFAULT.format(rank=rank))
        for layer in layers:
            _check_examples(layer)
        _check_independent(layers, "full()")
        whole = sum(layer.groups * layer.d_out * layer.d_in for layer in layers)
        return (Block("", tuple(layers), structure.fitted(1, whole)),)
    if isinstance(structure, Mapping):
        _check_patterns("structure", structure, [layer.name for layer in layers])
    assigned, default = [], []
    for layer in layers:
        chosen, by_unit = _chosen(layer, structure), unit_wise_by_kind(layer)
        # A product for all layers means: for all that can be one.
        implied = chosen is None or (isinstance(structure, BlockStructure) and structure.is_product and by_unit)
        if not implied:
            used = _checked(layers, layer, chosen)
        elif by_unit:
            used = unit_wise()
        else:
            used = _default(ranks[layer.name])
            default.append(layer.name)
        assigned.append(Block(layer.name, (layer,), used.for_layer(layer), implied))
    if rank is not None and not default:
        raise ValueError(_NO_DEFAULT.format(rank=rank))
    if isinstance(rank, Mapping):
        _check_patterns("rank", rank, default)
    return tuple(assigned)


def ranks_of(layers: Layers, rank: Rank) -> dict[str, int]:
    """Return the rank of each layer by name.

    Raises:
        ValueError: If a rank is below 1.
        TypeError: If a rank is no integer.
    """
    if not isinstance(rank, Mapping):
        low_rank(rank)  # raises for a bad one
        return {layer.name: rank for layer in layers}
    for pattern, one in rank.items():
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            kind = ValueError if isinstance(one, int) and not isinstance(one, bool) else TypeError
            raise kind(f"rank: expected an integer >= 1 for {pattern!r}, got {one!r}")
    return {
        layer.name: next((r for pattern, r in rank.items() if _matches(layer.name, pattern)), RANK) for layer in layers
    }


_NO_DEFAULT = (
    "rank: the structure decides for every layer, so that no layer takes the default with rank={rank}; leave rank "
    "out, or give the structure that rank, as in kronecker(low_rank({rank}), low_rank_plus_diagonal({rank}))"
)


def _default(rank: int) -> BlockStructure:
    return kronecker(low_rank(rank), low_rank_plus_diagonal(rank))


def _check_patterns(what: str, patterns: Mapping[str, Any], names: list[str]) -> None:
    left = names
    for pattern in patterns:
        matched = [name for name in names if _matches(name, pattern)]
        if not matched:
            raise ValueError(f"{what}: the pattern {pattern!r} matches none of the layers {names}")
        if not set(matched) & set(left):
            raise ValueError(
                f"{what}: the pattern {pattern!r} decides for no layer: earlier patterns match {matched}, too; "
                "put it before them, the first that matches counts"
            )
        left = [name for name in left if name not in matched]


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern is the name itself, which may have brackets, or matches it."""
    return name == pattern or fnmatchcase(name, pattern)


def _chosen(layer: Layer, structure: Chosen) -> Any:
    if isinstance(structure, Mapping):
        return next((value for pattern, value in structure.items() if _matches(layer.name, pattern)), None)
    if callable(structure):
        return structure(layer)
    return structure


def unit_wise_by_kind(layer: Layer) -> bool:
    """Return whether a layer is a scale or shift, whose block is no product."""
    return any(KINDS[kind].unit_wise for kind in layer.kinds)


def _checked(layers: Layers, layer: Layer, structure: Any) -> BlockStructure:
    if isinstance(structure, FactorStructure) and structure.stands_alone:
        structure = ExactStructure(structure, "layer")
    if isinstance(structure, BlockStructure):
        if structure.needs_examples:
            _check_examples(layer)
        if structure.needs_independence:
            _check_independent(layers, f"layer_wise() for {layer.name!r}")
        if structure.is_product and unit_wise_by_kind(layer):
            raise ValueError(
                f"structure: layer {layer.name!r} is a {layer.kind}, whose block is no Kronecker product; use "
                "unit_wise(), layer_wise() or diagonal()"
            )
        if structure.joins_layers:
            raise ValueError(f"structure: full() holds all layers together and cannot stand for {layer.name!r} alone")
        return structure
    if isinstance(structure, int):
        raise TypeError(
            f"structure: expected one such as kronecker(...), got {structure}; for a rank, rank={structure}"
        )
    raise TypeError(
        f"structure: expected kronecker(input, output), unit_wise(), layer_wise() or diagonal() for layer "
        f"{layer.name!r}, got {structure!r}; a factor structure such as dense() stands inside: "
        "kronecker(dense(), dense())"
    )


def _check_examples(layer: Layer) -> None:
    if not layer.by_example:
        raise ValueError(
            f"structure: layer {layer.name!r}: it is not known which rows belong to which example, so that single "
            'examples have no gradients; use kronecker(...) with treatment="expand", uncorrected, for it, call '
            "find_layers() with a batch of different examples and batch_axes=, or write the batch as the leading axis"
        )


def _check_independent(layers: Layers, structure: str) -> None:
    if not layers.independent:
        raise ValueError(
            f"structure: {structure} is made of the gradients of single examples, and these are not apart: outputs of "
            "one example depend on others, as with BatchNorm in training mode, or it is not known that they do not; "
            "use kronecker(...), or the module in eval() mode"
        )
