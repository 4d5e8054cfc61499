"""One function of many blocks: those of equal form in one call, so that operations do not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.leaves import tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.stacks import stacked
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import by_group, packed, signature
from lrkfac.core.curvature.covariances import WITH_PLAIN_ROWS

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
"""Kinds that become grouped convolutions where several layers are mapped over."""


LARGEST = {"cpu": 2**24}
"""Numbers that are stacked at most, by type of device: beyond, the operations of one layer take longer than the copy
that stacks them is worth. Measured on one CPU core.
"""


LARGEST_ELSEWHERE = 2**26
"""The same on other devices, by the time that copies (some TB/s) and starts of operations (some µs) take there: 256 MB
are copied in the time of a few of the about hundred operations that a stack saves for each layer.
"""


LARGEST_OF_CONVOLUTIONS = 2**18
"""The same of convolutions, on all devices: grouped ones of more numbers took up to twice as long on a CPU, and the
kernels of other devices for them are no better than one after another.
"""


Work = Callable[..., Any]
"""``work(block, damping, *operands, stacked=False)``: of one group of the block, or of several stacked blocks."""


class StackError(Exception):
    """A decomposition failed in a stack; ``blocks`` are its members."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = blocks


def together(
    work: Work,
    blocks: Sequence[Block],
    dampings: Mapping[str, float | Tensor],
    operands: Sequence[tuple[Any, ...]],
    sized_by: int = 0,
) -> list[Any]:
    """Return what a function makes of each block, alike ones stacked.

    What is stacked follows from the shapes of the operands alone.

    Args:
        work: The function.
        blocks: For which it is called.
        dampings: ``λ`` of each block, by name.
        operands: Trees of tensors for each block, with groups in front.
        sized_by: The number of the operand whose size decides how many blocks are stacked.

    Raises:
        StackError: If a matrix cannot be decomposed.
    """
    results: dict[int, Any] = {}
    for numbers in packed([_candidate(*pair, sized_by) for pair in zip(blocks, operands, strict=True)]):
        stack = [blocks[i] for i in numbers]
        try:
            of_stack = _of_stack(work, stack, [dampings[block.name] for block in stack], [operands[i] for i in numbers])
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise StackError(stack) from error
        results.update(zip(numbers, of_stack, strict=True))
    return [results[i] for i in range(len(blocks))]


def _of_stack(work: Work, stack: list[Block], each: list[float | Tensor], operands: list[tuple[Any, ...]]) -> list[Any]:
    """Call a function for equal blocks: by batched operations, or else mapped over; a block alone needs neither."""
    first = stack[0]

    def of_groups(damping: float | Tensor, *trees: Any) -> Any:
        return by_group(first, lambda *trees: work(first, damping, *trees))(*trees)

    if len(stack) == 1:
        return [of_groups(each[0], *operands[0])]
    common = all(one is each[0] for one in each)
    trees = optree.tree_map(lambda *x: stacked(x), *operands)
    device = tree_leaves(operands[0])[0].device
    damping = each[0] if common else torch.stack([torch.as_tensor(one, device=device) for one in each])
    if _has_plain_rows(first):
        result = work(first, damping, *trees, stacked=True)
    else:
        result = vmap(of_groups, in_dims=(None if common else 0, *[0 for _ in trees]))(damping, *trees)
    leaves, structure = tree_flatten(result)
    # Laid out as those of a block alone; what is repeated along an axis stays so.
    tidy = [x if 0 in x.stride() else x.contiguous() for x in leaves]
    members = zip(*[x.unbind() for x in tidy], strict=True) if tidy else [()] * len(stack)  # with B = I, no answers
    return [tree_unflatten(structure, list(x)) for x in members]


def _candidate(block: Block, operands: tuple[Any, ...], sized_by: int) -> tuple[Any, int, int]:
    """Return what blocks in one stack share, ``None`` for one that stays alone; its size; and the largest stack."""
    layer = block.layers[0]
    kinds = set(layer.kinds)
    if not block.structure.mappable or not kinds <= WITH_PLAIN_ROWS | CONVOLUTIONS:
        return None, 0, 0
    leaves = tree_leaves(operands)
    places = [(x.dtype, x.device) for x in leaves]
    sizes = (layer.d_in, layer.d_out, layer.groups, layer.bias is None)
    largest = LARGEST.get(leaves[0].device.type, LARGEST_ELSEWHERE)
    if kinds & CONVOLUTIONS:
        largest = min(largest, LARGEST_OF_CONVOLUTIONS)
    size = sum(x.numel() for x in tree_leaves(operands[sized_by]))
    return (block.structure, layer.kinds, layer.options, sizes, places, signature(operands)), size, largest


def _has_plain_rows(block: Block) -> bool:
    """Return whether a stack needs no ``vmap``: rows are at hand, and the structure takes those of several layers."""
    kinds = set(block.layers[0].kinds)
    return block.structure.stackable and len(kinds) == 1 and kinds <= WITH_PLAIN_ROWS
