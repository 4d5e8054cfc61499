"""Rows: the vectors along the last axis of what a layer received or of gradients at what it returned."""

from __future__ import annotations

import torch
from torch import Tensor


def as_real(x: Tensor, axis: int) -> Tensor:
    """Return complex numbers as real ones, with real and imaginary parts along a new axis; real numbers pass.

    For a real weight, a complex row is two real ones: autograd's gradient is ``Re Σ g conj(a)ᵀ = Σ (Re g Re aᵀ + Im g
    Im aᵀ)``.
    """
    return torch.view_as_real(x.resolve_conj()).movedim(-1, axis) if x.is_complex() else x


def padded(rows: Tensor, length: int) -> Tensor:
    """Return rows ``[n, *]`` with zeros behind them, ``[length, *]``; rows of that length pass."""
    missing = length - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def with_constant(rows: Tensor, axis: int) -> Tensor:
    """Return rows ``[..., d]`` with the constant input of a joint bias behind them, ``[..., d + 1]``.

    It is 1 everywhere, or, along an axis counted from the end, 1 for the first entry and 0 for the others: the value of
    a jet comes first, and what is added to it is added to none of its derivatives.
    """
    if axis == 0:
        return with_ones(rows)
    first = torch.arange(rows.shape[axis], device=rows.device) == 0
    first = first.to(rows.dtype).reshape(-1, *[1] * (-axis - 1))
    return torch.cat([rows, first.expand_as(rows[..., :1])], dim=-1)


def with_ones(rows: Tensor) -> Tensor:
    """Return rows ``[..., d]`` with the trailing 1 of a joint bias, ``[..., d + 1]``."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
