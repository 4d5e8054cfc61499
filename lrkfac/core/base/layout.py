"""Layout of tensors: the order of their axes in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_layout_of(x: Any, like: Any) -> Any:
    """Return ``x`` with its axes in the same order in memory as those of ``like``; a copy where the orders differ.

    So the trees of a training loop keep their layout from step to step, and nothing is compiled twice. Lazy matrices
    pass unchanged.
    """
    if not isinstance(x, Tensor) or not isinstance(like, Tensor) or x.stride() == like.stride():
        return x
    order = _order(like)
    if _order(x) == order:
        return x
    order += [i for i in range(x.ndim) if i not in order]
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


def _order(x: Tensor) -> list[int]:
    """Return the axes longer than 1, the one with the largest stride first."""
    strides = x.stride()
    order: list[int] = []
    for i in range(x.ndim):  # the compiler compares strides that are symbols, but sorts none
        if x.shape[i] > 1:
            order.insert(sum([strides[j] >= strides[i] for j in order]), i)
    return order
