"""``kept * previous + (1 - kept) * batch`` of a factor, neither of them formed."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.linalg.covariances import Covariance, RowCovariance
from lrkfac.core.linalg.operators import LowRankPlusDiagonal
from lrkfac.core.linalg.products import added


class Average(NamedTuple):
    """``previous + weight * batch``; several factors may be stacked along leading axes."""

    previous: LowRankPlusDiagonal
    batch: Covariance
    weight: Tensor

    def of_rows(self, x: Tensor, less: Tensor) -> Tensor:
        """Return ``x (M - diag(less))`` for rows ``x`` ``[*, k, d]``."""
        vectors, values, diagonal = self.previous
        if isinstance(self.batch, RowCovariance):
            new = replace(self.batch, scale=self.weight * self.batch.scale).of_rows(x)
        else:
            new = self.weight[..., None, None] * self.batch.matvec(x.mT).mT
        total = added(new, (x @ vectors) * values[..., None, :], vectors.mT)
        return torch.addcmul(total, x, (diagonal - less)[..., None, :])

    def between(self, x: Tensor, less: Tensor) -> Tensor:
        """Return ``x (M - diag(less)) xᵀ``."""
        vectors, values, diagonal = self.previous
        between = getattr(self.batch, "between", None)
        new = x @ self.batch.matvec(x.mT) if between is None else between(x)
        new = self.weight[..., None, None] * new
        along = x @ vectors
        return new + (along * values[..., None, :]) @ along.mT + (x * (diagonal - less)[..., None, :]) @ x.mT

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        return self.previous.diagonal + explained(*self.previous[:2]) + self.weight[..., None] * self.batch.diagonal()

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.previous.trace() + self.weight * self.batch.trace()


def average(kept: Tensor, previous: LowRankPlusDiagonal, batch: Covariance) -> Average:
    """Return ``kept * previous + (1 - kept) * batch``, with ``kept`` ``[*]``."""
    vectors, values, diagonal = previous
    return Average(LowRankPlusDiagonal(vectors, kept[..., None] * values, kept[..., None] * diagonal), batch, 1 - kept)


def explained(vectors: Tensor, values: Tensor) -> Tensor:
    """Return the diagonal of ``V diag(values) Vᵀ``."""
    return (vectors.square() @ values[..., None]).squeeze(-1)
