"""``kept * previous + (1 - kept) * batch`` of a factor, neither of them formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.eager import changes_in_place
from lrkfac.core.linalg.operators import LowRankPlusDiagonal
from lrkfac.core.linalg.products import added


class Average(NamedTuple):
    """``previous + weight * batch``, from what the covariance of a batch answers; several may be stacked.

    Attributes:
        previous: The last average, times ``kept``.
        weight: ``1 - kept``, ``[*]``.
    """

    previous: LowRankPlusDiagonal
    weight: Tensor

    def of_rows(self, x: Tensor, batch: Tensor, less: Tensor) -> Tensor:
        """Return ``x (M - diag(less))`` for rows ``x`` ``[*, k, d]``, from ``x`` times the covariance."""
        vectors, values, diagonal = self.previous
        total, weight = x * (diagonal - less)[..., None, :], self.weight[..., None, None]
        total = total.addcmul_(weight, batch) if changes_in_place() else torch.addcmul(total, weight, batch)
        return added(total, (x @ vectors) * values[..., None, :], vectors.mT)

    def between(self, x: Tensor, batch: Tensor, less: Tensor) -> Tensor:
        """Return ``x (M - diag(less)) xᵀ``, from that of the covariance."""
        vectors, values, diagonal = self.previous
        along = x @ vectors
        previous = (along * values[..., None, :]) @ along.mT + (x * (diagonal - less)[..., None, :]) @ x.mT
        return self.weight[..., None, None] * batch + previous


def average(kept: Tensor, previous: LowRankPlusDiagonal) -> Average:
    """Return ``kept * previous + (1 - kept) * batch``, with ``kept`` ``[*]``."""
    vectors, values, diagonal = previous
    return Average(LowRankPlusDiagonal(vectors, kept[..., None] * values, kept[..., None] * diagonal), 1 - kept)


def explained(vectors: Tensor, values: Tensor) -> Tensor:
    """Return the diagonal of ``V diag(values) Vᵀ``."""
    return (vectors.square() @ values[..., None]).squeeze(-1)
