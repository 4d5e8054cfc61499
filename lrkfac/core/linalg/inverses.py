"""Inverses of operators; for low rank plus diagonal, without ever forming a ``d × d`` matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import most_precise
from lrkfac.core.base.eager import has_values
from lrkfac.core.linalg.bases import has_twice_the_precision, margin, orthonormal
from lrkfac.core.linalg.definite import cholesky_with_margin
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, LowRankPlusIsotropic, TransposedKronecker
from lrkfac.core.linalg.operator_checks import check_operator
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal
from lrkfac.core.linalg.triangles import inverse_of_triangle, triangles


def damped_inverse(operator: Any, damping: float | Tensor) -> Any:
    """Return the inverse of a valid operator plus damping, which is split between the factors of a product."""
    return _inverse(operator.shifted(damping), _cholesky_inverse, _woodbury)


def differentiable_inverse(operator: Any) -> Any:
    """Return the inverse of a valid operator, by operations that have derivatives where eigenvalues are equal, too.

    It is also more precise than ``damped_inverse``: a dense matrix is shifted only where rounding makes it necessary.
    """
    return _inverse(operator, _unshifted_inverse, _inverse_by_triangles)


def _inverse(operator: Any, of_dense: Callable[..., Dense], of_low_rank: Callable[..., LowRankPlusDiagonal]) -> Any:
    if isinstance(operator, Kronecker):
        return Kronecker(*[_inverse(factor, of_dense, of_low_rank) for factor in operator])
    if isinstance(operator, LowRankPlusDiagonal):
        return of_low_rank(operator)
    if isinstance(operator, Dense):
        return of_dense(operator)
    if isinstance(operator, EigenbasisKronecker):
        return _inverse_in_basis(operator)
    if isinstance(operator, Diagonal):
        return Diagonal(1 / operator.diagonal)
    if isinstance(operator, LowRankPlusIsotropic):
        floor = margin(operator.vectors) * operator.values.amax(dim=-1)
        return LowRankPlusIsotropic(operator.vectors, 1 / operator.values, 1 / torch.maximum(operator.rest, floor))
    if isinstance(operator, EigenspaceKronecker):
        return operator._replace(output=_inverse(operator.output, of_dense, of_low_rank))
    if isinstance(operator, TransposedKronecker):
        return TransposedKronecker(_inverse(operator.transposed, of_dense, of_low_rank))
    raise TypeError(
        f"operator: expected one of lrkfac's operators, got {type(operator).__name__}; a structure with a custom "
        "operator needs a method inverse(state, damping)"
    )


def _cholesky_inverse(operator: Dense) -> Dense:
    # Rounding alone can make a matrix of large condition indefinite: a shift of a few ulps of its norm
    # is within the factorisation's own error and keeps both the factor and the inverse positive definite.
    norm = operator.matrix.abs().sum(dim=-1).amax(dim=-1)
    shifted = operator.shifted(margin(operator.matrix) * norm).matrix
    # Elsewhere than on the CPU the host would wait for the check: NaN then shows in the loss.
    factor, info = torch.linalg.cholesky_ex(shifted, check_errors=has_values(shifted))
    factor = torch.where(info[..., None, None] == 0, factor, torch.nan)
    return Dense(torch.cholesky_inverse(factor).mT)  # symmetric, and row-major so


def _unshifted_inverse(operator: Dense) -> Dense:
    """Return the inverse by a Cholesky factor, with the shift of ``_cholesky_inverse`` only where pivots ask for it."""
    lower = cholesky_with_margin(operator.matrix, "operator")
    half = inverse_of_triangle(lower)
    return Dense(half.mT @ half)


def _inverse_by_triangles(operator: LowRankPlusDiagonal) -> LowRankPlusDiagonal:
    """Return ``M⁻¹ = D^{-1/2} (I - W Wᵀ + Z Zᵀ) D^{-1/2}``, with columns of ``W`` and ``Z`` by the sign of the values.

    ``W Wᵀ`` is shrunk and ``D`` has a floor, as in ``semidefinite_inverse``.
    """
    scale, (vectors, values, _) = _scale(operator), operator
    found = triangles(LowRankPlusDiagonal(vectors, values, scale.square().reciprocal()), cholesky=cholesky_with_margin)
    largest = found.upper.square().sum(dim=(-2, -1))[..., None]  # a bound of the largest eigenvalue of I + UᵀU
    kept = ((1 - margin(vectors)) * (1 + 1 / largest)).clamp(max=1)
    inverted = found.inverse_updates() / found.scale[..., None]
    signs = torch.where(values > 0, -kept, torch.where(values < 0, 1.0, 0.0))
    return LowRankPlusDiagonal(inverted.to(vectors.dtype), signs.to(vectors.dtype), scale.square())


def _inverse_in_basis(operator: EigenbasisKronecker) -> EigenbasisKronecker:
    # Differences of eigenvalues are applied: those beyond the precision of the largest are raised to it, so that
    # the inverse stays positive definite (see woodbury).
    groups = operator.kept, operator.output, operator.input, operator.rest
    largest = torch.stack([values.amax() for values in groups]).amax()
    kept, output, input, rest = (1 / values.clamp(min=margin(values) * largest) for values in groups)
    return EigenbasisKronecker(operator.output_vectors, operator.input_vectors, kept, output, input, rest)


def woodbury(operator: LowRankPlusDiagonal) -> LowRankPlusDiagonal:
    """Return the inverse of ``M = D + V Λ Vᵀ`` in matrix form, in O(d r²).

    With ``U = D^{-1/2} V |Λ|^{1/2} = Q R`` and ``R sign(Λ) Rᵀ = P diag(μ) Pᵀ``,
    ``M⁻¹ = D⁻¹ - D^{-1/2} Q P diag(μ / (1 + μ)) (Q P)ᵀ D^{-1/2}``: the formula of Woodbury in a basis
    in which the capacitance matrix is diagonal. Since ``Q P`` is orthonormal to rounding, positive
    definiteness only asks that ``μ / (1 + μ) < 1``, which is enforced with a margin of a few ulps; a
    Cholesky factor of ``I + UᵀU`` gives no such guarantee in float32.

    Directions beyond the precision (in float32, of less than 4e-6 times the largest eigenvalue) are noise. There
    ``D`` is raised to that floor: the inverse is then too small along them rather than too large along others.

    Args:
        operator: Positive definite, with ``D > 0``; values of either sign.

    Returns:
        Vectors ``[d, min(d, r)]``, values of the opposite signs, diagonal ``1 / D``.

    Raises:
        ValueError: If the entries of ``operator`` do not fit together.
        TypeError: If it is no ``LowRankPlusDiagonal`` of floating-point tensors.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import LowRankPlusDiagonal, woodbury
        >>> vectors = torch.tensor([[1.0], [1.0]])
        >>> M = LowRankPlusDiagonal(vectors, torch.tensor([2.0]), torch.ones(2))
        >>> bool(torch.allclose(woodbury(M).to_dense() @ M.to_dense(), torch.eye(2), atol=1e-5))
        True
    """
    check_operator(operator, LowRankPlusDiagonal)
    return _woodbury(operator)


def _woodbury(operator: LowRankPlusDiagonal) -> LowRankPlusDiagonal:
    scale, roots = _scale(operator), operator.values.abs().sqrt()[..., None, :]
    basis, triangle = torch.linalg.qr(scale[..., None] * operator.vectors * roots)
    accurate = triangle.to(most_precise(triangle.device))
    mu, rotation = torch.linalg.eigh((accurate * operator.values.sign()[..., None, :]) @ accurate.mT)
    shrinkage = mu / (1 + mu).clamp(min=torch.finfo(basis.dtype).eps)
    vectors = scale[..., None] * (basis @ rotation.to(basis.dtype))
    return LowRankPlusDiagonal(vectors, -shrinkage.clamp(max=1 - margin(basis)).to(basis.dtype), scale.square())


def semidefinite_inverse(operator: LowRankPlusDiagonal) -> LowRankPlusDiagonal:
    """Return what ``woodbury`` does for values that are all ``≥ 0``, without eigenvalues and a wait for them.

    With ``U = D^{-1/2} V Λ^{1/2}`` and a triangle ``T`` such that ``TᵀT = I + UᵀU``, ``W = U T⁻¹`` gives
    ``M⁻¹ = D⁻¹ - D^{-1/2} W Wᵀ D^{-1/2}``. The smallest eigenvalue of ``I - W Wᵀ``, which is ``1 / (1 + μ)`` with the
    largest one ``μ`` of ``UᵀU``, is right to a few ulps of 1. Where ``μ``, by its bound in the largest sum of a row,
    may be so large that these matter, ``W Wᵀ`` is shrunk as far as the margin of ``woodbury`` asks. ``D`` has the same
    floor, with which ``μ`` is at most ``r`` over the margin.

    Args:
        operator: ``[*, d, d]``, with values ``≥ 0`` and ``D > 0``; several may be stacked.

    Returns:
        Vectors ``[*, d, r]``, values ``[*, r]`` that are all about -1, diagonal ``1 / D``.
    """
    scale, roots = _scale(operator), operator.values.sqrt()[..., None, :]
    updates = scale[..., None] * operator.vectors * roots
    by = _whitened_by_cholesky if has_twice_the_precision(updates) else _whitened_by_qr
    whitened, largest = by(updates)
    kept = ((1 - margin(updates)) * (1 + 1 / largest)).clamp(max=1)[..., None]
    # Contiguous as those of every inverse, of one or of a stack.
    values = (-kept).to(updates.dtype).expand(operator.values.shape).contiguous()
    return LowRankPlusDiagonal((scale[..., None] * whitened).contiguous(), values, scale.square())


def _whitened_by_cholesky(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``W`` of ``semidefinite_inverse``, and a bound of ``1 + μ``, by products in twice the precision.

    There, ``μ`` of at most ``r`` over the margin of float32 leaves nine digits to the factor.
    """
    accurate = updates.to(torch.float64)
    identity = torch.eye(updates.shape[-1], dtype=torch.float64, device=updates.device)
    capacitance = accurate.mT @ accurate + identity
    factor = torch.linalg.cholesky_ex(capacitance).L
    inverse = torch.linalg.solve_triangular(factor, identity.expand(factor.shape), upper=False)
    return (accurate @ inverse.mT).to(updates.dtype), torch.linalg.matrix_norm(capacitance, torch.inf)


def _whitened_by_qr(updates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from ``[U; I] = [W; S] T``, of orthonormal columns, by which nothing is squared."""
    d, r = updates.shape[-2:]
    identity = torch.eye(r, dtype=updates.dtype, device=updates.device).expand(*updates.shape[:-2], r, r)
    both = orthonormal(torch.cat([updates.mT, identity], dim=-1).mT)  # rows in memory, as the updates are
    lengths = torch.linalg.vector_norm(both, dim=-2, keepdim=True)  # 1 but for rounding, which grows with d
    return both[..., :d, :] / lengths, 1 + torch.linalg.matrix_norm(updates.mT @ updates, torch.inf)


def sherman_morrison(operator: LowRankPlusDiagonal) -> LowRankPlusDiagonal:
    """Return the inverse of ``M = D + Σ λᵢ vᵢ vᵢᵀ`` by one rank-one update after another, in O(d r²).

    With ``uᵢ = |λᵢ|^{1/2} D^{-1/2} vᵢ``, ``sᵢ = sign λᵢ`` and the rest that the first ``i - 1`` updates left,
    ``yᵢ = uᵢ - Σ_{j<i} cⱼ wⱼ (wⱼᵀ uᵢ)``, the formula of Sherman and Morrison gives
    ``wᵢ = yᵢ / √(1 + sᵢ uᵢᵀ yᵢ)``, ``cᵢ = sᵢ`` and ``M⁻¹ = D⁻¹ - D^{-1/2} (Σ cᵢ wᵢ wᵢᵀ) D^{-1/2}``.

    Repeated updates are not backward stable (Hashemi & Nakatsukasa 2025, arXiv 2510.01696): hence the
    scaling by ``D^{-1/2}``, float64 inside where the device has it, positive updates first, so that
    every matrix on the way is positive definite, and the floor of ``woodbury`` for ``D``.
    ``woodbury`` computes the same with a fixed number of operations, and ``inverse`` uses it.

    Args:
        operator: Positive definite, with ``D > 0``; values of either sign.

    Returns:
        Vectors ``[d, r]``, values -1 or 1 (0 where the operator's are), diagonal ``1 / D``.

    Raises:
        ValueError: If the entries of ``operator`` do not fit together.
        TypeError: If it is no ``LowRankPlusDiagonal`` of floating-point tensors.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import LowRankPlusDiagonal, sherman_morrison
        >>> vectors = torch.tensor([[1.0], [1.0]])
        >>> M = LowRankPlusDiagonal(vectors, torch.tensor([2.0]), torch.ones(2))
        >>> bool(torch.allclose(sherman_morrison(M).to_dense() @ M.to_dense(), torch.eye(2), atol=1e-5))
        True
    """
    check_operator(operator, LowRankPlusDiagonal)
    dtype, accurate = operator.vectors.dtype, most_precise(operator.vectors.device)
    order = operator.values.argsort(descending=True)
    values = operator.values[order].to(accurate)
    floor = margin(operator.vectors) * _eigenvalues(operator).sum()
    scale = torch.maximum(operator.diagonal, floor).to(accurate).rsqrt()
    updates = scale[:, None] * operator.vectors[:, order].to(accurate) * values.abs().sqrt()
    signs = values.sign()
    done = updates[:, :0]
    for i in range(updates.shape[1]):
        u = updates[:, i]
        y = u - done @ (signs[:i] * (done.mT @ u))
        pivot = 1 + signs[i] * (u * y).sum()
        w = y / pivot.clamp(min=torch.finfo(accurate).tiny).sqrt()
        done = torch.cat([done, w[:, None]], dim=1)
    return LowRankPlusDiagonal((scale[:, None] * done).to(dtype), -signs.to(dtype), scale.square().to(dtype))


def _scale(operator: LowRankPlusDiagonal) -> Tensor:
    """Return ``D^{-1/2}``, with ``D`` raised to the floor that ``woodbury`` describes."""
    floor = margin(operator.vectors) * _eigenvalues(operator).amax(dim=-1, keepdim=True)
    return torch.maximum(operator.diagonal, floor).rsqrt()


def _eigenvalues(operator: LowRankPlusDiagonal) -> Tensor:
    """Return the eigenvalue of each positive rank-one term."""
    return (operator.values * operator.vectors.square().sum(dim=-2)).clamp(min=0)
