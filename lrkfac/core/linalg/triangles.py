"""Triangular factors of low rank plus diagonal, of which come its roots and its determinant.

Nothing is squared in float64, and no eigenvectors are taken: derivatives exist where eigenvalues are equal, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.linalg.bases import has_twice_the_precision
from lrkfac.core.linalg.definite import check_positive, checked_cholesky
from lrkfac.core.linalg.operators import LowRankPlusDiagonal
from lrkfac.core.linalg.roots import LowRankRoot


class Triangles(NamedTuple):
    """``M = D^{1/2} (I + U Uᵀ - N Nᵀ) D^{1/2}`` by triangles.

    Columns of ``U`` are 0 where values are negative, those of ``N`` and ``Y`` where they are not.

    Attributes:
        scale: ``D^{1/2}``, ``[*, d]``.
        updates: ``U``, ``[*, d, r]``.
        upper: ``T`` with ``TᵀT = I + UᵀU``.
        whitened: ``W = U T⁻¹``.
        downdates: ``Y = S⁻¹ N`` with ``S = I + U (I + Tᵀ)⁻¹ Uᵀ``, for which ``S Sᵀ = I + U Uᵀ``.
        lower: ``L`` with ``L Lᵀ = I - YᵀY``.
    """

    scale: Tensor
    updates: Tensor
    upper: Tensor
    whitened: Tensor
    downdates: Tensor
    lower: Tensor

    def root(self) -> LowRankRoot:
        """Return ``D^{1/2} S (I - Y (I + L)⁻¹ Yᵀ)``."""
        first = _solved(_plus_identity(self.upper.mT), self.updates)
        second = -_solved(_plus_identity(self.lower), self.downdates)
        return self._joined(self.scale, first, self.updates, second)

    def inverse_root(self) -> LowRankRoot:
        """Return the transposed inverse of ``root``, ``D^{-1/2} (I - W C Wᵀ) (I + Y L⁻ᵀ (I + L)⁻¹ Yᵀ)``."""
        first = -self.whitened @ _whitening(self.upper)
        second = _solved(_plus_identity(self.lower), _solved(self.lower.mT, self.downdates, upper=True))
        return self._joined(1 / self.scale, first, self.whitened, second)

    def inverse_updates(self) -> Tensor:
        """Return ``W + (I - W C Wᵀ) Y L⁻ᵀ``, of which columns count as negative where values are positive."""
        beside = _solved(self.lower.mT, self.downdates, upper=True)
        return self.whitened + beside - self.whitened @ (_whitening(self.upper) @ (self.whitened.mT @ beside))

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant, ``[*]``."""
        of_updates, of_downdates = (x.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) for x in (self.upper, self.lower))
        return 2 * (self.scale.log().sum(dim=-1) + of_updates + of_downdates)

    def _joined(self, scale: Tensor, first: Tensor, right: Tensor, second: Tensor) -> LowRankRoot:
        """Return ``(I + first rightᵀ) (I + second Yᵀ)``, whose columns have no place in common."""
        left = first + second + first @ (right.mT @ second)
        return LowRankRoot(scale, left, right + self.downdates)


def triangles(
    operator: LowRankPlusDiagonal, name: str = "operator", cholesky: Callable[[Tensor, str], Tensor] = checked_cholesky
) -> Triangles:
    """Return the triangles of a positive definite operator with ``D > 0``, one or several stacked, in O(d r²).

    With ``TᵀT = I + UᵀU``, ``(I + U K Uᵀ) (I + U Kᵀ Uᵀ) = I + U Uᵀ`` holds for ``K + Kᵀ + K UᵀU Kᵀ = I``, which
    ``K⁻¹ = I + Tᵀ`` solves; ``K⁻¹ = -(I + L)`` does the same for what is subtracted. Of float32, the triangles are in
    float64 where the device has it.
    """
    if cholesky is checked_cholesky:
        check_positive(operator.diagonal, f"{name}.diagonal", "entry")
    doubled = has_twice_the_precision(operator.vectors)
    vectors, values, diagonal = (x.double() for x in operator) if doubled else operator
    scale = diagonal.sqrt()
    roots = torch.where(values == 0, 1.0, values.abs()).sqrt()
    scaled = vectors / scale[..., None] * roots[..., None, :]
    positive, negative = (values > 0)[..., None, :], (values < 0)[..., None, :]
    updates, downdates = torch.where(positive, scaled, 0.0), torch.where(negative, scaled, 0.0)
    upper, whitened = _factored(updates, squared=doubled)
    whitened = torch.where(positive, whitened, 0.0)
    downdates = downdates - whitened @ (_whitening(upper).mT @ (whitened.mT @ downdates))
    downdates = torch.where(negative, downdates, 0.0)
    lower = cholesky(_plus_identity(-(downdates.mT @ downdates)), f"{name} relative to its diagonal")
    return Triangles(scale, updates, upper, whitened, downdates, lower)


def _factored(updates: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """Return ``T`` and ``W`` of ``Triangles``; ``squared`` where twice the precision of ``U`` allows for ``UᵀU``."""
    if squared:
        upper = torch.linalg.cholesky_ex(_plus_identity(updates.mT @ updates)).L.mT
        return upper, _solved(upper, updates, upper=True)
    d, r = updates.shape[-2:]
    identity = torch.eye(r, dtype=updates.dtype, device=updates.device).expand(*updates.shape[:-2], r, r)
    basis, triangle = torch.linalg.qr(torch.cat([updates, identity], dim=-2))
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(updates.dtype)
    return signs[..., None] * triangle, basis[..., :d, :] * signs[..., None, :]


def _whitening(upper: Tensor) -> Tensor:
    """Return ``C = (I + Tᵀ)⁻¹ Tᵀ``, for which ``(I - W C Wᵀ) (I - W Cᵀ Wᵀ) = (I + U Uᵀ)⁻¹``."""
    return torch.linalg.solve_triangular(_plus_identity(upper.mT), upper.mT, upper=False)


def _solved(triangle: Tensor, columns: Tensor, upper: bool = False) -> Tensor:
    """Return ``columns triangle⁻¹``."""
    return torch.linalg.solve_triangular(triangle, columns, upper=upper, left=False)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def inverse_of_triangle(lower: Tensor) -> Tensor:
    """Return ``L⁻¹``."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity.expand(lower.shape), upper=False)
