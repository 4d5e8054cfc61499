"""Tensors of several layers as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.eager import is_plain_and_constant


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape along a new first axis, not to be changed in place.

    Nothing is copied where they lie in memory one after another. Parts of a stack lie so, and so the states of layers
    that were refreshed together do until they are saved and loaded.
    """
    step = _step(tensors)
    if not step:
        return torch.stack(list(tensors))
    first = tensors[0]
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()), first.storage_offset())


def neighbours(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of tensors in groups of one form within one memory, in its order, as layers in a stack have.

    Where operations of several may not be one, each is a group.
    """
    if not is_plain_and_constant(tensors):
        return [[i] for i in range(len(tensors))]
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        key = x.shape, x.stride(), x.dtype, x.device, x.untyped_storage().data_ptr()
        groups.setdefault(key, []).append(i)
    return [sorted(group, key=lambda i: tensors[i].storage_offset()) for group in groups.values()]


def evenly_spaced(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return ``neighbours`` at equal distances along a new first axis without a copy; ``None`` for others."""
    if len(tensors) < 2:  # also because the compiler knows no offsets
        return None
    offsets = [x.storage_offset() for x in tensors]
    steps = {two - one for one, two in pairwise(offsets)}
    if len(steps) != 1 or 0 in steps:
        return None
    first = tensors[0]
    return first.as_strided((len(tensors), *first.shape), (steps.pop(), *first.stride()), offsets[0])


def _step(tensors: Sequence[Tensor]) -> int:
    """Return the distance in memory from each tensor to the next, 0 where a copy is needed.

    Each is contiguous, as after a copy, or one number repeated: rounding depends on how matrices lie in memory.
    """
    first = tensors[0]
    if len(tensors) < 2 or not is_plain_and_constant(tensors):
        return 0
    repeated = first.ndim > 0 and not any(first.stride())
    step = 1 if repeated else first.numel()
    if not repeated and not first.is_contiguous():
        return 0
    start, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    follow = all(
        x.storage_offset() == start + i * step
        and x.untyped_storage().data_ptr() == memory
        and x.dtype == first.dtype
        and x.shape == first.shape
        and x.stride() == first.stride()
        for i, x in enumerate(tensors)
    )
    return step if follow else 0


def picked(x: Any, index: Tensor) -> Any:
    """Return ``pick`` of each leaf of a tree; of those of layers in a stack in one call."""
    leaves, structure = optree.tree_flatten(x)
    picked: dict[int, Tensor] = {}
    for numbers in neighbours(leaves):
        stack = None if _is_same(leaves[numbers[0]]) else evenly_spaced([leaves[i] for i in numbers])
        if stack is None:
            picked.update({i: pick(leaves[i], index) for i in numbers})
        else:
            picked.update(zip(numbers, stack.index_select(1, index)[:, 0].unbind(), strict=True))
    return optree.tree_unflatten(structure, [picked[i] for i in range(len(leaves))])


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[index]`` for an index ``[1]``, without asking for its value."""
    return x[0] if _is_same(x) else x.index_select(0, index)[0]


def _is_same(x: Tensor) -> bool:
    """Return whether all candidates are one, as averages are, which do not depend on a damping."""
    return len(x) == 1 or x.stride(0) == 0
