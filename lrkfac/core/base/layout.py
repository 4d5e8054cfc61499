"""Layout of tensors: the order of axes in memory, and the constant column of a joint bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def laid_out_like(x: Any, like: Any) -> Any:
    """``x`` with its axes in the same order in memory as those of ``like``, by a copy where they are in another.

    So the trees of a training loop keep their layout from step to step, and nothing is compiled twice. What is not
    formed is passed on.
    """
    if not isinstance(x, Tensor) or not isinstance(like, Tensor) or x.stride() == like.stride():
        return x
    order = _order(like)
    if _order(x) == order:
        return x
    order += [i for i in range(x.ndim) if i not in order]
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


def _order(x: Tensor) -> list[int]:
    """The axes longer than 1, that of the largest stride first."""
    strides = x.stride()
    return sorted([i for i in range(x.ndim) if x.shape[i] > 1], key=lambda i: -strides[i])


def with_ones(rows: Tensor) -> Tensor:
    """Rows with the trailing 1 of a joint bias."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
