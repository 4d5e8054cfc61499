"""The second moment of rows that are at hand: what both layers and structures make of data."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RowCovariance:
    """``scale * rowsᵀ rows`` with ``rows`` ``[n, d]``."""

    rows: Tensor
    scale: Tensor

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """``C V``."""
        return self.scale * (self.rows.mT @ (self.rows @ vectors))

    def diagonal(self) -> Float[Tensor, "d"]:
        """The diagonal."""
        return self.scale * self.rows.square().sum(dim=0)

    def trace(self) -> Float[Tensor, ""]:
        """The trace."""
        return self.scale * self.rows.square().sum()

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return self.scale * (self.rows.mT @ self.rows)
