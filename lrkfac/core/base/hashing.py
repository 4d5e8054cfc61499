"""Random numbers as a function of their place: equal on every device, in compiled code, under ``vmap``, in any part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
"""Odd, and 2³² over the golden ratio: multiples of it differ in many bits."""


def hashed(x: Tensor) -> Tensor:
    """Return the finaliser of MurmurHash3, in which each bit depends on all bits of ``x``; a permutation of int32."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= _signed(0x85EBCA6B)  # int32 wraps around
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    return x


def new_seeds(*shape: int, device: torch.device) -> Tensor:
    """Return seeds for ``uniform`` from torch's default generator of the device, int32 ``[*shape, 2]``."""
    return torch.randint(-(2**31), 2**31, (*shape, 2), dtype=torch.int32, device=device)


def uniform(seed: Tensor, numbers: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uniform numbers in (0, 1) that depend on the seed, the number of the example and the place in it alone.

    So any part of the examples can be drawn by itself. The numbers are odd multiples of 2⁻²⁴, equal in all dtypes.

    Rows and columns have keys, hashes of 32 bits. Their sum ``x`` goes through ``x (2 x + 1)``, the permutation of RC6
    (Rivest et al. 1998), whose upper bits depend on all bits. That takes a third of the time of a hash of each place,
    and on a CPU less than ``torch.rand``.

    Args:
        seed: One of ``new_seeds``, int32 ``[2]``: a half for rows and one for columns. So no two seeds give shifted
            copies of one stream unless both halves meet.
        numbers: Of the examples, integers ``[n]`` below 2³².
        shape: Of one example.
        dtype: Of the result, at least float32.

    Returns:
        ``[n, *shape]``.
    """
    *leading, last = shape or (1,)
    rows = _keys(seed[0], numbers.to(torch.int32))
    for size in leading:
        rows = _keys(rows, torch.arange(size, dtype=torch.int32, device=seed.device))
    columns = _keys(seed[1], torch.arange(last, dtype=torch.int32, device=seed.device))
    x = rows[..., None] + columns
    x *= (2 * rows + 1)[..., None] + 2 * columns
    x >>= 9  # signed: from -2²² to 2²² - 1
    return x.to(dtype).mul_(2**-23).add_(0.5 + 2**-24).reshape(len(numbers), *shape)


def _keys(keys: Tensor, numbers: Tensor) -> Tensor:
    """Return a key for each pair of a key and a number, along a new last axis."""
    return hashed(keys[..., None] + numbers * _signed(GOLDEN))


def _signed(x: int) -> int:
    """Return the int32 with the bits of the lower half of a number."""
    return (x + 2**31) % 2**32 - 2**31
