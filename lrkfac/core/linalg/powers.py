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
            return LowRankPlusDiagonal(vectors, factor[..., None] * values, factor[..., None] * diagonal)
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
        rest = power(diagonal[..., :1])
        if vectors.shape[-1] == operator.dimension:  # there is no rest, and nothing to cancel
            rest = torch.zeros_like(rest)
        values = power(values + diagonal[..., :1]) - rest
        return Power(LowRankPlusDiagonal(vectors, values, rest.expand(diagonal.shape)), mean)
    if isinstance(operator, Diagonal):
        return Power(Diagonal(power(operator.diagonal)), mean)
    if isinstance(operator, Dense):
        eigenvalues, vectors = torch.linalg.eigh(without_subnormal(operator.matrix))
        return Power(Dense((vectors * power(eigenvalues)[..., None, :]) @ vectors.mT), mean)
    raise TypeError(f"operator: expected one whose powers are of its own class, got {type(operator).__name__}")
