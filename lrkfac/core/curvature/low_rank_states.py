"""States of low-rank factors, and the numbers that describe them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.curvature.spectra import Damped, Spectrum, damped_of, spectrum_of
from lrkfac.core.linalg.eigenspaces import LowRankPlusIsotropic
from lrkfac.core.linalg.operators import LowRankPlusDiagonal


class LowRankState(NamedTuple):
    """``V diag(values) Vᵀ + residual (I - V Vᵀ)``: orthonormal ``vectors`` ``[d, r]``, ``values`` ``[r]``,
    ``residual`` ``[]``; ``steps`` int64 ``[]``.
    """

    vectors: Tensor
    values: Tensor
    residual: Tensor
    steps: Tensor

    def spectrum(self) -> Spectrum:
        d, r = self.vectors.shape
        return spectrum_of(self.values, (d - r) * self.residual)

    def damped(self, inverse: Any, damping: Tensor, eigenvalues: Tensor) -> Damped:
        # The damped inverse knows the weight of the residual: weight * residual + damping.
        (d, r), damped_residual = self.vectors.shape, 1 / inverse.diagonal[0] if inverse else self.residual + damping
        groups = [(eigenvalues, eigenvalues + damping, 1)]
        return damped_of(groups + ([(self.residual[None], damped_residual[None], d - r)] if r < d else []))

    def inner(self, other: LowRankState) -> Tensor:
        return self.operator().inner(other.operator())

    def squared_distance(self, other: LowRankState) -> Tensor:
        return _squared_distance(self.operator(), other.operator())

    def eigenpairs(self, weight: float = 1.0) -> LowRankPlusIsotropic:
        """Return the average as eigenpairs and one number for all other directions, that times a weight."""
        return LowRankPlusIsotropic(self.vectors, self.values, weight * self.residual)

    def operator(self, weight: float = 1.0) -> LowRankPlusDiagonal:
        """Return the average, with its residual times a weight."""
        residual = (self.residual if weight == 1 else weight * self.residual)[..., None]
        return LowRankPlusDiagonal(self.vectors, self.values - residual, residual.expand(self.vectors.shape[:-1]))


class LowRankPlusDiagonalState(NamedTuple):
    """``V diag(values) Vᵀ + diag(diagonal)``: ``vectors`` ``[d, r]``, orthonormal but for rows shortened to
    keep the diagonal, ``values`` ``[r]``, ``diagonal`` ``[d]``, both ``≥ 0``; ``steps`` int64 ``[]``.
    """

    vectors: Tensor
    values: Tensor
    diagonal: Tensor
    steps: Tensor

    def spectrum(self) -> Spectrum:
        return spectrum_of(self.values * self.vectors.square().sum(dim=0), self.diagonal.sum())

    def damped(self, inverse: LowRankPlusDiagonal, damping: Tensor, eigenvalues: Tensor) -> Damped:
        # With M = V Λ Vᵀ + D, and E in place of D in what was inverted, tr(M (V Λ Vᵀ + E)⁻¹) = Σ D/E + Σ (1 - D/E) h,
        # where h is the diagonal of U (I + UᵀU)⁻¹ Uᵀ and U = E^{-1/2} V Λ^{1/2}: sums without cancellation.
        damped_diagonal = 1 / inverse.diagonal
        scaled = damped_diagonal.rsqrt()[:, None] * self.vectors * self.values.clamp(min=0).sqrt()
        mu, rotation = torch.linalg.eigh(scaled.mT @ scaled)
        explained_share = (scaled @ rotation).square() @ (1 / (1 + mu.clamp(min=0)))
        ratio = self.diagonal / damped_diagonal
        effective = (ratio + (1 - ratio) * explained_share).sum()
        return Damped(effective, self._largest(damped_diagonal), damped_diagonal.amin())

    def largest(self) -> Tensor:
        """Return an upper bound of the eigenvalues, at most twice the largest."""
        return self._largest(self.diagonal)

    def _largest(self, diagonal: Tensor) -> Tensor:
        pairs = self.values.clamp(min=0).sqrt() * self.vectors
        return torch.linalg.eigvalsh(pairs.mT @ pairs).amax() + diagonal.amax()

    def inner(self, other: LowRankPlusDiagonalState) -> Tensor:
        return self.operator().inner(other.operator())

    def squared_distance(self, other: LowRankPlusDiagonalState) -> Tensor:
        return _squared_distance(self.operator(), other.operator())

    def operator(self, weight: float = 1.0) -> LowRankPlusDiagonal:
        """Return the average, with its diagonal times a weight."""
        diagonal = self.diagonal if weight == 1 else weight * self.diagonal
        return LowRankPlusDiagonal(self.vectors, self.values, diagonal)


def _squared_distance(one: LowRankPlusDiagonal, two: LowRankPlusDiagonal) -> Tensor:
    """Return ``‖M - N‖²`` by the difference itself, which is exact where the two are near."""
    difference = LowRankPlusDiagonal(
        torch.cat([one.vectors, two.vectors], dim=-1),
        torch.cat([one.values, -two.values], dim=-1),
        one.diagonal - two.diagonal,
    )
    return difference.inner(difference).clamp(min=0)
