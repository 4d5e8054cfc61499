"""Ranks by the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import optree
import torch

from lrkfac.core.curvature.assignment import Block, Choice, Chosen, Rank, blocks, ranks_of, unit_wise_by_kind
from lrkfac.core.curvature.blocks import Held, dtype_of, identity, init
from lrkfac.core.curvature.factors import DenseStructure, DiagonalStructure, FactorStructure
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure, LowRankStructure
from lrkfac.core.layers.description import Layers, check_layers

LARGEST = 64
"""Rank that ``rank="auto"`` does not exceed, whatever the memory: operations grow with it."""


COPIES = 2
"""Copies of the parameters that ``rank="auto"`` may take the memory of: as many as the averages of Adam."""


COUNTER = 8
"""Bytes of the number of steps since a block's last statistics."""


AutoRank = Rank | Literal["auto"]


def resolved(layers: Layers, structure: Chosen, rank: AutoRank | None) -> Rank | None:
    """The ranks that ``rank="auto"`` stands for: those of a budget of two copies of the covered parameters, and at
    most ``LARGEST``; any other rank as it is.
    """
    if not isinstance(rank, str):
        return rank
    if rank != "auto":
        raise TypeError(f'rank: expected an integer >= 1, "auto" or a mapping from names to integers, got {rank!r}')
    if structure is None and all(unit_wise_by_kind(layer) for layer in layers):
        return None  # nothing takes one
    numbers = sum(layer.groups * layer.d_out * layer.d_in for layer in layers)
    size = torch.float32.itemsize * COPIES * numbers
    return ranks_within(layers, structure, size, torch.float32, LARGEST, always=True)


def ranked(layers: Layers, rank: AutoRank, of_rank: Callable[[int], Choice]) -> Chosen:
    """The structure of each layer's rank."""
    check_layers(layers)
    chosen = resolved(layers, None, rank)
    if isinstance(rank, str) and chosen is None:
        return of_rank(LARGEST)
    if not isinstance(chosen, Mapping):
        return of_rank(cast(int, chosen))
    blocks(layers, None, chosen)  # refuses patterns that decide for no layer
    ranks = ranks_of(layers, chosen)
    return lambda layer: None if unit_wise_by_kind(layer) else of_rank(ranks[layer.name])


def ranks_within(
    layers: Layers,
    structure: Chosen,
    budget: int,
    dtype: torch.dtype | None,
    largest: int | None = None,
    always: bool = False,
) -> dict[str, int]:
    """For each layer that takes the default structure its rank, such that the whole state fits; see ``explain``.

    At most ``largest``; where not even rank 1 fits, this ``always``. Without a dtype, that of the parameters.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget: expected an integer, a number of bytes, got {budget!r}")
    names = free(blocks(layers, structure, None))
    if not names:
        raise ValueError("rank: the structure decides for every layer, so that there is none to choose; leave it out")
    size = partial(_bytes, layers, structure, dtype=dtype, known={})
    low, high = 1, largest or max(max(layer.d_in, layer.d_out) for layer in layers)
    if size(low) > budget and not always:
        raise ValueError(
            f"budget: expected at least {size(low)} bytes, which the state takes at rank 1, got {budget}; give "
            "more, or another structure to the widest layers"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    ranks = dict.fromkeys(names, low)
    if low != largest:
        for name in ranks:
            more = {**ranks, name: low + 1}
            ranks = more if size(more) <= budget else ranks
    return ranks


def _bytes(layers: Layers, structure: Chosen, rank: Rank, dtype: torch.dtype | None, known: dict[Any, int]) -> int:
    total = 0
    for block in blocks(layers, structure, rank):
        held_in = dtype or dtype_at_start(block)
        form = form_of(block), held_in
        if form not in known:
            known[form] = _plain_size(block, held_in) or size_of(held_at_start(block, held_in))
        total += known[form] + COUNTER
    return total


def _plain_size(block: Block, dtype: torch.dtype) -> int | None:
    """``size_of(held_at_start(...))`` of a product by arithmetic, which a search among ranks needs often."""
    if not isinstance(block.structure, KroneckerStructure):
        return None
    (layer,) = block.layers
    numbers = [
        _numbers(factor, d)
        for factor, d in ((block.structure.input, layer.d_in), (block.structure.output, layer.d_out))
    ]
    if None in numbers:
        return None
    size = torch.promote_types(dtype, torch.float32).itemsize
    counts = 2 * torch.int64.itemsize
    return layer.groups * (size * (sum(n for n in numbers if n is not None) + 2) + counts)


def _numbers(factor: FactorStructure, d: int) -> int | None:
    """How many a factor's average and inverse have."""
    if isinstance(factor, DenseStructure):
        return 2 * d * d
    if isinstance(factor, DiagonalStructure):
        return 2 * d
    if isinstance(factor, LowRankStructure | LowRankPlusDiagonalStructure):
        r = min(factor.rank, d)
        rest = 1 if isinstance(factor, LowRankStructure) else d
        return 2 * (d * r + r) + rest + d
    return None


def free(held: tuple[Block, ...]) -> list[str]:
    """The layers that take the default structure, and with it a rank."""
    return [block.name for block in held if block.implied and not unit_wise_by_kind(block.layers[0])]


def form_of(block: Block) -> Any:
    """What the cost of a block depends on."""
    sizes = [(layer.d_in, layer.d_out, layer.groups, layer.bias is None) for layer in block.layers]
    return block.structure, tuple(sizes)


def dtype_at_start(block: Block) -> torch.dtype:
    """The dtype in which a block is held by default."""
    return dtype_of(block, {layer.weight.index: layer.weight for layer in block.layers})


def held_at_start(block: Block, dtype: torch.dtype) -> Held:
    """What the state holds of a block at the start, without numbers."""
    like = {layer.weight.index: torch.empty((), dtype=dtype, device="meta") for layer in block.layers}
    return identity(block, init(block, like))


def size_of(held: Held) -> int:
    """Bytes of all tensors."""
    return sum(x.numel() * x.itemsize for x in optree.tree_leaves(tuple(held)))
