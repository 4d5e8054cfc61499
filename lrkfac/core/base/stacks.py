"""Tensors of several layers as one."""

from __future__ import annotations

from collections.abc import Sequence

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
