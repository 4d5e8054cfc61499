"""Rows: the vectors along the last axis of what a layer received or of gradients at what it returned."""

from __future__ import annotations

import torch
from torch import Tensor


def with_ones(rows: Tensor) -> Tensor:
    """Return rows ``[..., d]`` with the trailing 1 of a joint bias, ``[..., d + 1]``."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
