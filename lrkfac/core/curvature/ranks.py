"""Ranks by the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import optree
import torch

from lrkfac.core.curvature.assignment import Block, Choice, Chosen, Rank, blocks, ranks_of, unit_wise_by_kind
from lrkfac.core.curvature.blocks import BlockState, dtype_of, initial_state
from lrkfac.core.layers.description import Layers, check_layers

LARGEST = 64
"""Rank that ``rank="auto"`` does not exceed, whatever the memory: operations grow with it."""


COPIES = 2
"""Copies of the parameters that ``rank="auto"`` may take the memory of: as many as the averages of Adam."""


COUNTER = 8
"""Bytes of the number of steps since a block's last statistics."""


AutoRank = Rank | Literal["auto"]


def resolved(layers: Layers, structure: Chosen, rank: AutoRank | None) -> Rank | None:
    """Return ranks for ``rank="auto"``: those of a budget of two copies of the covered parameters, and at most
    ``LARGEST``; any other rank as it is.
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
    """Return the structure of each layer, from its rank."""
    check_layers(layers)
    chosen = resolved(layers, None, rank)
    if isinstance(rank, str) and chosen is None:
        return of_rank(LARGEST)
    if not isinstance(chosen, Mapping):
        return of_rank(cast(int, chosen))
    blocks(layers, None, chosen)  # raises for patterns that decide for no layer
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
    """Return ranks of the layers that take the default structure, such that the whole state fits; see ``explain``.

    They are at most ``largest``. With ``always``, they are 1 where not even that fits. ``dtype`` is by default that of
    the parameters.
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
        block_dtype = dtype or dtype_at_start(block)
        key = cost_key(block), block_dtype
        if key not in known:
            known[key] = _bytes_by_formula(block, block_dtype) or bytes_of(state_at_start(block, block_dtype))
        total += known[key] + COUNTER
    return total


def _bytes_by_formula(block: Block, dtype: torch.dtype) -> int | None:
    """Return ``bytes_of(state_at_start(...))`` of a product by arithmetic, which a search among ranks needs often."""
    layer = block.layers[0]
    numbers = block.structure.size(layer.d_in, layer.d_out)
    if numbers is None:
        return None
    size = torch.promote_types(dtype, torch.float32).itemsize
    counts = 2 * torch.int64.itemsize
    return layer.groups * (size * numbers + counts)


def free(assigned: tuple[Block, ...]) -> list[str]:
    """Return the names of layers that take the default structure, and with it a rank."""
    return [block.name for block in assigned if block.implied and not unit_wise_by_kind(block.layers[0])]


def cost_key(block: Block) -> Any:
    """Return a hashable key of all that the cost of a block depends on."""
    sizes = [(layer.d_in, layer.d_out, layer.groups, layer.bias is None) for layer in block.layers]
    return block.structure, tuple(sizes)


def dtype_at_start(block: Block) -> torch.dtype:
    """Return the dtype of a block's state by default."""
    return dtype_of(block, {layer.weight.index: layer.weight for layer in block.layers})


def state_at_start(block: Block, dtype: torch.dtype) -> BlockState:
    """Return the state of a block at the start, without numbers."""
    like = {layer.weight.index: torch.empty((), dtype=dtype, device="meta") for layer in block.layers}
    return initial_state(block, like)


def bytes_of(state: BlockState) -> int:
    """Return the bytes of all tensors."""
    return sum(x.numel() * x.itemsize for x in optree.tree_leaves(state))
