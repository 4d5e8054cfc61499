"""Blocks of equal form are refreshed in one batched call, so that the number of operations does not grow with depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.blocks import Held, refresh
from lrkfac.core.choice import Block
from lrkfac.core.kronecker import KroneckerStructure
from lrkfac.core.layers import BIAS, LINEAR
from lrkfac.core.types import Statistics

LARGEST = 2**24
"""Numbers of statistics that are stacked at most: beyond, operations are long enough to be made one by one."""
LARGEST_OF_CONVOLUTIONS = 2**18
"""The same of convolutions, which stacked become grouped ones: larger, they took up to twice as long on a CPU."""
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def refresh_all(
    blocks: Sequence[Block],
    held: dict[str, Held],
    statistics: Statistics,
    damping: float | Tensor,
    decay: float | Tensor,
) -> dict[str, Held]:
    """``blocks.refresh`` of each block, by name.

    Blocks of linear layers or convolutions with equal structure, sizes, options and shapes of statistics are
    stacked and refreshed together.

    Raises:
        ValueError: As ``blocks.refresh``.
    """
    found: dict[str, Held] = {}
    for group in _groups(blocks, held, statistics):
        if len(group) > 1:
            try:
                found.update(_together(group, held, statistics, damping, decay))
                continue
            except ValueError:
                pass  # one of them is refused, by name, below
        for block in group:
            found[block.name] = refresh(block, held[block.name], statistics, damping, decay)
    return {block.name: found[block.name] for block in blocks}


def _together(
    group: list[Block], held: dict[str, Held], statistics: Statistics, damping: float | Tensor, decay: float | Tensor
) -> dict[str, Held]:
    first = group[0]

    def one(state: Any, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Held:
        own = Statistics({first.name: inputs}, {first.name: gradients}, statistics.scale)
        return refresh(first, Held(state, (), ()), own, damping, decay)

    each = [(held[b.name].state, statistics.inputs[b.name], statistics.output_gradients[b.name]) for b in group]
    leaves, structure = optree.tree_flatten(vmap(one)(*optree.tree_map(lambda *x: torch.stack(x), *each)))
    # Laid out as those of a block alone; what is repeated along an axis stays so.
    tidy = [x if 0 in x.stride() else x.contiguous() for x in leaves]
    members = zip(*[x.unbind() for x in tidy], strict=True)
    return {b.name: optree.tree_unflatten(structure, list(own)) for b, own in zip(group, members, strict=True)}


def _groups(blocks: Sequence[Block], held: dict[str, Held], statistics: Statistics) -> list[list[Block]]:
    """Blocks that may be stacked, in the order of their first; the others alone."""
    found: list[tuple[Any, int, list[Block]]] = []
    for block in blocks:
        form, size = _form(block, held, statistics)
        convolved = CONVOLUTIONS.intersection(block.layers[0].kinds)
        largest = min(LARGEST, LARGEST_OF_CONVOLUTIONS) if convolved else LARGEST
        for i, (other, stacked, group) in enumerate(found):
            if form is not None and form == other and stacked + size <= largest:
                found[i] = (other, stacked + size, [*group, block])
                break
        else:
            found.append((form, size, [block]))
    return [group for _, _, group in found]


def _form(block: Block, held: dict[str, Held], statistics: Statistics) -> tuple[Any, int]:
    """What blocks must have in common, and the numbers in their statistics; ``None`` for a block that stays alone."""
    (layer, *others) = block.layers
    stackable = isinstance(block.structure, KroneckerStructure) and set(layer.kinds) <= {
        LINEAR.name,
        BIAS.name,
        *CONVOLUTIONS,
    }
    if others or not stackable or not statistics.inputs.get(layer.name):
        return None, 0
    rows = [*statistics.inputs[layer.name], *statistics.output_gradients[layer.name]]
    tensors = [(tuple(x.shape), x.dtype, x.device) for x in (*rows, *optree.tree_leaves(held[block.name].state))]
    sizes = (layer.d_in, layer.d_out, layer.groups, layer.bias is None)
    return (block.structure, layer.kinds, layer.options, sizes, tensors), sum(x.numel() for x in rows)
