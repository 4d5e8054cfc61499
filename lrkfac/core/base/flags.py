"""Static flags as a tensor, without a copy from the host to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 62
"""Flags that one int64 holds."""


def flags_like(flags: Sequence[bool], like: Tensor) -> Tensor:
    """Return 0 or 1 for each flag, int64 ``[n]``, on the device of ``like``: bits of numbers that kernels receive.

    A tensor of a list would be copied from the host, for which the host of a GPU waits.
    """
    words = [sum(1 << i for i, flag in enumerate(flags[at : at + BITS]) if flag) for at in range(0, len(flags), BITS)]
    places = torch.arange(min(len(flags), BITS), dtype=torch.int64, device=like.device)
    parts = [torch.bitwise_right_shift(torch.full_like(places, word), places) & 1 for word in words]
    return torch.cat(parts)[: len(flags)] if len(parts) > 1 else parts[0]
