"""One function of many blocks: those of equal form in one call, so that operations do not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.leaves import tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.private_torch import is_transformed
from lrkfac.core.base.stacks import stacked
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import by_group, packed, signature
from lrkfac.core.curvature.covariances import WITH_PLAIN_ROWS
from lrkfac.core.linalg.eigen import ritz_of_all

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


class Stack(NamedTuple):
    """Equal blocks whose tensors lie along a new leading axis, or a block alone, without one.

    Attributes:
        numbers: Of the blocks, among all.
        blocks: The blocks.
        damping: ``λ``, with a leading axis unless it is ``common`` to all.
        common: Whether it is.
    """

    numbers: list[int]
    blocks: list[Block]
    damping: float | Tensor
    common: bool

    def joined(self, each: Sequence[Any]) -> Any:
        """Return a tree of the stack's tensors from those of all blocks."""
        trees = [each[i] for i in self.numbers]
        return trees[0] if len(trees) == 1 else optree.tree_map(lambda *x: stacked(x), *trees)

    def call(self, work: Work, *trees: Any) -> Any:
        """Call a function for all: by batched operations, or else mapped over; a block alone needs neither.

        Raises:
            StackError: If a matrix cannot be decomposed.
        """
        first = self.blocks[0]

        def of_groups(damping: float | Tensor, *trees: Any) -> Any:
            return by_group(first, lambda *trees: work(first, damping, *trees))(*trees)

        try:
            if len(self.blocks) == 1:
                return of_groups(self.damping, *trees)
            if _has_plain_rows(first):
                return work(first, self.damping, *trees, stacked=True)
            return vmap(of_groups, in_dims=(None if self.common else 0, *[0 for _ in trees]))(self.damping, *trees)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise StackError(self.blocks) from error

    def apart(self, result: Any) -> dict[int, Any]:
        """Return the tree of each block, by number, from that of the stack."""
        if len(self.blocks) == 1:
            return {self.numbers[0]: result}
        leaves, structure = tree_flatten(result)
        # Laid out as those of a block alone; what is repeated along an axis stays so.
        tidy = [x if 0 in x.stride() else x.contiguous() for x in leaves]
        members = zip(*[x.unbind() for x in tidy], strict=True) if tidy else [()] * len(self.blocks)  # with B = I
        trees = [tree_unflatten(structure, list(x)) for x in members]
        return dict(zip(self.numbers, trees, strict=True))


def stacks_of(
    blocks: Sequence[Block],
    dampings: Mapping[str, float | Tensor],
    operands: Sequence[tuple[Any, ...]],
    sized_by: int = 0,
) -> list[Stack]:
    """Return all blocks in stacks, which follow from the shapes of the operands alone; see ``together``."""
    stacks = []
    for numbers in packed([_candidate(*pair, sized_by) for pair in zip(blocks, operands, strict=True)]):
        stack = [blocks[i] for i in numbers]
        each = [dampings[block.name] for block in stack]
        common = all(one is each[0] for one in each)
        damping = each[0]
        if not common:
            device = tree_leaves(operands[numbers[0]])[0].device
            damping = torch.stack([torch.as_tensor(one, device=device) for one in each])
        stacks.append(Stack(numbers, stack, damping, common))
    return stacks


def together(
    work: Work,
    blocks: Sequence[Block],
    dampings: Mapping[str, float | Tensor],
    operands: Sequence[tuple[Any, ...]],
    sized_by: int = 0,
) -> list[Any]:
    """Return what a function makes of each block, alike ones stacked.

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
    for stack in stacks_of(blocks, dampings, operands, sized_by):
        results.update(stack.apart(stack.call(work, *stack.joined(operands))))
    return [results[i] for i in range(len(blocks))]


def solved_together(stacks: Sequence[list[Block]], problems: Sequence[Any]) -> list[Any]:
    """Return ``ritz_of_all`` of the matrices of several stacks of blocks, or of blocks, each a tree.

    Raises:
        StackError: If a matrix cannot be decomposed; with the blocks to which it belongs.
    """
    try:
        solved: list[Any] = ritz_of_all(list(problems))
        return solved
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        for blocks, own in zip(stacks, problems, strict=True):
            if any(not is_transformed(x) and not bool(x.isfinite().all()) for x in tree_leaves(own)):
                raise StackError(blocks) from error
        raise StackError([block for blocks in stacks for block in blocks]) from error


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
