"""Two operations on the rows of jets in which a parameter acts on the values alone, as calls that the capture sees."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.private_torch import hand_to_mode, is_watched


def linear_of_jets(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``F.linear`` of the rows ``[K, ..., d_in]`` of a jet; the bias belongs to the values, the first of them.

    A capture sees one layer of ``K`` rows for each point, whose joint bias has the constant input ``(1, 0, …, 0)``.
    """
    if is_watched():
        result: Tensor = hand_to_mode(linear_of_jets, (rows, weight, bias), {})
        return result
    return F.linear(rows, weight) + _of_values(bias, rows)


def added_to_values(rows: Tensor, shift: Tensor) -> Tensor:
    """Return the rows ``[K, ...]`` of a jet to whose values a tensor of no more axes than those is added."""
    if is_watched():
        result: Tensor = hand_to_mode(added_to_values, (rows, shift), {})
        return result
    return rows + _of_values(shift, rows)


def _of_values(x: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor as the first of ``K`` rows, with as many axes as ``rows``; the others are 0."""
    first = x.reshape(1, *[1] * (rows.ndim - 1 - x.ndim), *x.shape)
    return F.pad(first, (*[0, 0] * (rows.ndim - 1), 0, rows.shape[0] - 1))
