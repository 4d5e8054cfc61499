"""Second moments of what is at hand: what both layers and structures make of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.types import Covariance


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


@dataclass(frozen=True)
class DiagonalCovariance:
    """A diagonal matrix, such as that of one-hot rows: how often each number occurs."""

    entries: Tensor

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """``C V``."""
        return self.entries[:, None] * vectors

    def diagonal(self) -> Float[Tensor, "d"]:
        """The diagonal."""
        return self.entries

    def trace(self) -> Float[Tensor, ""]:
        """The trace."""
        return self.entries.sum()

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return torch.diag(self.entries)


@dataclass(frozen=True)
class SumCovariance:
    """``Σ weights[i] * parts[i]``."""

    parts: tuple[Covariance, ...]
    weights: tuple[Tensor, ...]

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """``C V``."""
        return self._sum(lambda part: part.matvec(vectors))

    def diagonal(self) -> Float[Tensor, "d"]:
        """The diagonal."""
        return self._sum(lambda part: part.diagonal())

    def trace(self) -> Float[Tensor, ""]:
        """The trace."""
        return self._sum(lambda part: part.trace())

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return self._sum(lambda part: part.dense())

    def _sum(self, of: Callable[[Covariance], Tensor]) -> Tensor:
        terms = [weight * of(part) for part, weight in zip(self.parts, self.weights, strict=True)]
        return torch.stack(terms).sum(dim=0)
