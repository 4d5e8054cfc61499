"""Negative powers of damped operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.linalg.eigen import without_subnormal
from lrkfac.core.linalg.operators import Dense, Diagonal, LowRankPlusDiagonal, Operator, mean_eigenvalue


class KroneckerPower(NamedTuple):
    """``(B + δ_B I)^-p`` and ``(A + δ_A I)^-p``, powers of the factors of a Kronecker product."""

    output: Operator
    input: Operator

    @property
    def dimension(self) -> int:
        """Number of rows of the product."""
        return self.output.dimension * self.input.dimension


class Power(NamedTuple):
    """``(M / m + share I)^-p``, with the mean eigenvalue ``m`` of ``M`` ``[*]``."""

    operator: Any
    mean: Tensor

    def unscaled(self, exponent: float) -> Any:
        """Return ``(M + share m I)^-p``; the identity of a zero matrix stays."""
        factor = torch.where(self.mean > 0, self.mean, 1.0) ** -exponent
        if isinstance(self.operator, LowRankPlusDiagonal):
            vectors, values, diagonal = self.operator
            rest = factor[..., None] * diagonal[..., :1]
            return LowRankPlusDiagonal(vectors, factor[..., None] * values, rest.expand(diagonal.shape))
        (entries,) = self.operator
        return type(self.operator)(factor.reshape(*factor.shape, *[1] * (entries.ndim - factor.ndim)) * entries)


def negative_power(operator: Operator, exponent: float, share: float | Tensor) -> Power:
    """Return ``(M / m + share I)^-p`` as an operator of the same class; of a zero matrix, the identity.

    Args:
        operator: Positive semi-definite: ``Dense``, by eigenvectors; ``Diagonal``; or ``LowRankPlusDiagonal`` with
            orthonormal vectors and a multiple of the identity, of which powers have the same vectors. Several may be
            stacked.
        exponent: ``p ≥ 0``.
        share: Damping as a share of the mean eigenvalue ``m``, positive, a number or ``[*]``.

    Raises:
        TypeError: If the operator is another.
    """
    mean = mean_eigenvalue(operator)
    known, shares = mean > 0, torch.zeros_like(mean) + share
    unit = torch.where(known, mean, 1.0)

    def power(eigenvalues: Tensor) -> Tensor:
        damped = (eigenvalues / unit[..., None]).clamp(min=0) + shares[..., None]
        return torch.where(known[..., None], damped, 1.0) ** -exponent

    if isinstance(operator, LowRankPlusDiagonal):
        vectors, values, diagonal = operator
        powers = power(values + diagonal[..., :1])
        # Where there is no rest, the least power in its place leaves nothing to cancel.
        whole = vectors.shape[-1] == operator.dimension
        rest = powers.amin(dim=-1, keepdim=True) if whole else power(diagonal[..., :1])
        return Power(LowRankPlusDiagonal(vectors, powers - rest, rest.expand(diagonal.shape)), mean)
    if isinstance(operator, Diagonal):
        return Power(Diagonal(power(operator.diagonal)), mean)
    if isinstance(operator, Dense):
        eigenvalues, vectors = torch.linalg.eigh(without_subnormal(operator.matrix))
        return Power(Dense((vectors * power(eigenvalues)[..., None, :]) @ vectors.mT), mean)
    raise TypeError(f"operator: expected one whose powers are of its own class, got {type(operator).__name__}")
