"""``kept * previous + (1 - kept) * batch`` of a factor, neither of them formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.eager import changes_in_place
from lrkfac.core.linalg.products import added


class Average(NamedTuple):
    """``V diag(values) Vᵀ + diag(diagonal) + weight * batch``, from what the covariance of a batch answers.

    Several may be stacked. The first two terms are the last average, times ``kept``.

    Attributes:
        vectors: ``V``, ``[*, d, r]``.
        values: ``[*, r]``.
        diagonal: ``[*, d]``, or ``[*, 1]`` for one number.
        weight: ``1 - kept``, ``[*]``.
    """

    vectors: Tensor
    values: Tensor
    diagonal: Tensor
    weight: Tensor

    def of_rows(self, x: Tensor, batch: Tensor, rest: Tensor | None) -> Tensor:
        """Return ``x M`` for rows ``x`` ``[*, k, d]``, from ``x`` times the covariance.

        In the place of ``diagonal`` stands ``rest`` ``[*, d]``, ``None`` for 0.
        """
        weight = self.weight[..., None, None]
        if rest is None:
            total = weight * batch
        else:
            total = x * rest[..., None, :]
            total = total.addcmul_(weight, batch) if changes_in_place() else torch.addcmul(total, weight, batch)
        return added(total, (x @ self.vectors) * self.values[..., None, :], self.vectors.mT)

    def between(self, x: Tensor, batch: Tensor, rest: Tensor | None) -> Tensor:
        """Return ``x M xᵀ``, from that of the covariance; ``rest`` as in ``of_rows``."""
        along = x @ self.vectors
        previous = (along * self.values[..., None, :]) @ along.mT
        if rest is not None:
            previous = added(previous, x * rest[..., None, :], x.mT)
        return torch.addcmul(previous, self.weight[..., None, None], batch)


def explained(vectors: Tensor, values: Tensor) -> Tensor:
    """Return the diagonal of ``V diag(values) Vᵀ``."""
    return (vectors.square() @ values[..., None]).squeeze(-1)
