"""Which structure holds which layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lrkfac.core.corrected import CorrectedStructure
from lrkfac.core.factors import DiagonalStructure, FactorStructure, diagonal
from lrkfac.core.kronecker import KroneckerStructure
from lrkfac.core.layers import KINDS
from lrkfac.core.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.structures import BlockStructure, ProductStructure, Structure, kronecker, unit_wise
from lrkfac.core.types import Layer, Layers

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
