"""Damped inverses of operators; of Kronecker products with split or with exact damping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_number
from lrkfac.core.linalg.bases import margin
from lrkfac.core.linalg.custom import method_of
from lrkfac.core.linalg.eigen import without_subnormal
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, LowRankPlusIsotropic, TransposedKronecker
from lrkfac.core.linalg.inverses import differentiable_inverse, semidefinite_inverse
from lrkfac.core.linalg.operator_checks import check_operator, is_custom
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator, TreeOperator

ExactInverse = EigenbasisKronecker | EigenspaceKronecker | TransposedKronecker
EXACT = (EigenbasisKronecker, EigenspaceKronecker, TransposedKronecker)
"""What ``exactly_damped_inverse`` returns; ``two_sided`` and ``of_outer_products`` take stacks along leading axes."""


def inverse(operator: Operator | TreeOperator, damping: float | Tensor = 0.0, exact: bool = False) -> Operator:
    """Return ``(M + damping I)⁻¹`` as an operator.

    For a Kronecker product the damping is split between the factors (``Kronecker.shifted``) unless ``exact``. Then
    ``(B ⊗ A + λ I)⁻¹`` itself comes from eigenvectors of one factor,
    ``A = V diag(a) Vᵀ + ρ (I - V Vᵀ)``: ``Σⱼ (aⱼ B + λ I)⁻¹ ⊗ vⱼ vⱼᵀ + (ρ B + λ I)⁻¹ ⊗ (I - V Vᵀ)``. Beside a
    ``LowRankPlusDiagonal`` of rank ``k`` and dimension ``d`` these are ``r + 1`` of its form, ``(r + 1) d (k + 2)``
    numbers. With eigenvectors of both factors they are shared, and only eigenvalues are inverted.

    Args:
        operator: A symmetric matrix such that ``M + damping I`` is positive definite. A method
            ``inverse(damping, exact)`` of a custom operator is called.
        damping: ``λ ≥ 0``, a number or a tensor ``[]``.
        exact: Whether to damp a Kronecker product exactly. One factor must have eigenvectors: a
            ``LowRankPlusIsotropic`` has, those of a ``Dense`` are computed in O(d³), those of a ``Diagonal`` are unit
            vectors. Other operators are damped exactly in any case.

    Returns:
        The inverse, symmetric and positive definite, of the same class. That of an exactly damped product has its
        methods, and is no product.

    Raises:
        ValueError: If ``damping`` is a negative or non-finite number, or the entries of ``operator`` do not fit
            together.
        TypeError: If ``operator`` is not one of the package's operators nor a custom one with the method; with
            ``exact``, if it is the product of two ``LowRankPlusDiagonal``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, Kronecker, inverse
        >>> one = Diagonal(torch.tensor([1.0, 3.0]))
        >>> inverse(one, damping=1.0).diagonal
        tensor([0.5000, 0.2500])
        >>> inverse(Kronecker(one, one), damping=1.0, exact=True).matvec(torch.ones(4))
        tensor([0.5000, 0.2500, 0.2500, 0.1000])
    """
    check_number(damping, "damping", 0)
    check_flag(exact, "exact")
    if is_custom(operator) and callable(getattr(operator, "inverse", None)):
        return operator.inverse(damping, exact)  # type: ignore[union-attr]
    check_operator(operator)
    if exact and isinstance(operator, Kronecker):
        _check_factors(operator)
        return exactly_damped_inverse(operator, damping)
    inverted: Operator = differentiable_inverse(operator.shifted(damping))  # type: ignore[union-attr]
    return inverted


def damped(operator: Operator | TreeOperator, damping: float | Tensor, exact: bool = True) -> Operator:
    """Return ``M + damping I`` as an operator: of a Kronecker product ``B ⊗ A + λ I`` itself.

    With ``A = V diag(a) Vᵀ + ρ (I - V Vᵀ)`` that is ``Σⱼ (aⱼ B + λ I) ⊗ vⱼ vⱼᵀ + (ρ B + λ I) ⊗ (I - V Vᵀ)``. It has all
    functions of operators, differentiable in ``λ``, which need no further eigenvectors. For several ``λ`` make
    ``damped(product, 0.0)`` once: damping that again only adds to its eigenvalues.

    Args:
        operator: A positive semi-definite operator, one of ``lrkfac.linalg`` or a custom one, whose method
            ``damped(damping, exact)`` or else ``shifted(damping)`` is called.
        damping: ``λ ≥ 0``, a number or a tensor ``[]``.
        exact: As for ``inverse``; without it, the damping of a product is split (``Kronecker.shifted``). Other
            operators are damped exactly in any case.

    Returns:
        The sum, of the same class, but for an exactly damped product: that has its methods, and is none.

    Raises:
        ValueError: If ``damping`` is a negative or non-finite number, or the entries of ``operator`` do not fit
            together.
        TypeError: If ``operator`` is no operator; with ``exact``, if it is the product of two ``LowRankPlusDiagonal``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, Kronecker, damped, diagonal
        >>> one = Diagonal(torch.tensor([1.0, 3.0]))
        >>> diagonal(damped(Kronecker(one, one), 1.0))
        tensor([ 2.,  4.,  4., 10.])
    """
    check_number(damping, "damping", 0)
    check_flag(exact, "exact")
    custom = method_of(operator, "damped", or_else="shifted")
    if custom:
        return custom(damping, exact)
    if not exact or not isinstance(operator, Kronecker):
        return operator.shifted(damping)  # type: ignore[union-attr]
    _check_factors(operator)
    output, input = _decomposed(operator)
    if not isinstance(input, LowRankPlusIsotropic):
        return TransposedKronecker(EigenspaceKronecker(_along(input, output, damping), output.vectors))
    if not isinstance(output, LowRankPlusIsotropic):
        return EigenspaceKronecker(_along(output, input, damping), input.vectors)
    (u, b, sigma), (v, a, rho) = output, input
    return EigenbasisKronecker(u, v, _outer(b, a), b * rho, sigma * a, sigma * rho).shifted(damping)


def _along(
    output: Diagonal | LowRankPlusDiagonal, input: LowRankPlusIsotropic, damping: float | Tensor
) -> Diagonal | LowRankPlusDiagonal:
    """Return ``aⱼ B + λ I`` along each eigenvector of ``A``, and ``ρ B + λ I`` where there are others, stacked."""
    a = input.values if input.is_complete else torch.cat([input.values, input.rest[None]])
    if isinstance(output, Diagonal):
        return Diagonal(_outer(a, output.diagonal)).shifted(damping)
    vectors = output.vectors.expand(*a.shape, *output.vectors.shape)
    return LowRankPlusDiagonal(vectors, _outer(a, output.values), _outer(a, output.diagonal)).shifted(damping)


def _check_factors(product: Kronecker) -> None:
    """Raise unless both factors are of the package: of others, no eigenvectors are known."""
    for factor in product:
        check_operator(factor)


def exactly_damped_inverse(product: Kronecker, damping: float | Tensor, semidefinite: bool = False) -> ExactInverse:
    """Return ``(B ⊗ A + λ I)⁻¹`` for ``λ > 0``, from eigenvectors of at least one factor.

    See ``inverse``. Where the eigenvectors of both factors are known, they are shared by all inverses, and all that is
    left are eigenvalues.

    A ``LowRankPlusIsotropic`` has its eigenvectors, those of a ``Dense`` are computed, and those of a ``Diagonal`` are
    unit vectors. A ``LowRankPlusDiagonal`` has none: beside a ``Diagonal`` it is decomposed as a dense matrix.

    What is beyond the precision is rounding: in float32, no eigenvalue of ``B ⊗ A`` is taken to be more than 3e5 times
    as large as the damped one of a direction that differs from its own on one side alone.

    Args:
        product: Of positive semi-definite factors.
        damping: ``λ``.
        semidefinite: Whether the values of a ``LowRankPlusDiagonal`` are known to be ``≥ 0``, which is faster.

    Raises:
        TypeError: If both factors are low rank plus diagonal.
    """
    output, input = _decomposed(product)
    if isinstance(output, LowRankPlusIsotropic) and isinstance(input, LowRankPlusIsotropic):
        return _in_both_bases(output, input, damping)
    if isinstance(input, LowRankPlusIsotropic):
        return _in_eigenspaces(output, input, damping, semidefinite)
    return TransposedKronecker(_in_eigenspaces(input, output, damping, semidefinite))


def _decomposed(product: Kronecker) -> tuple[Any, Any]:
    """Return output and input, at least one of them by its eigenvectors, as ``exactly_damped_inverse`` says.

    Raises:
        TypeError: If both factors are low rank plus diagonal.
    """
    output, input = (_with_eigenvectors(factor) for factor in product)
    if isinstance(output, Diagonal) or isinstance(input, Diagonal):
        other = input if isinstance(output, Diagonal) else output
        if isinstance(other, LowRankPlusDiagonal):
            other = _with_eigenvectors(Dense(other.to_dense()))
        elif isinstance(other, Diagonal):
            other = LowRankPlusIsotropic(torch.diag_embed(torch.ones_like(other[0])), other[0], other[0].new_zeros(()))
        output, input = (output, other) if isinstance(output, Diagonal) else (other, input)
    if isinstance(output, LowRankPlusIsotropic) or isinstance(input, LowRankPlusIsotropic):
        return output, input
    raise TypeError(
        "operator: (B ⊗ A + λ I)⁻¹ needs eigenvectors of one factor, and both are LowRankPlusDiagonal; give one as "
        "LowRankPlusIsotropic, or as Dense(to_dense(...)), or split the damping with exact=False"
    )


def _with_eigenvectors(factor: Any) -> Any:
    """Return a dense factor by its eigenvectors, others as they are."""
    if not isinstance(factor, Dense):
        return factor
    values, vectors = torch.linalg.eigh(without_subnormal(factor.matrix))
    return LowRankPlusIsotropic(vectors.contiguous(), values.clamp(min=0), values[..., 0].clamp(min=0))


def _in_both_bases(
    output: LowRankPlusIsotropic, input: LowRankPlusIsotropic, damping: float | Tensor
) -> EigenbasisKronecker:
    small, (u, b, sigma), (v, a, rho) = margin(input.vectors), output, input
    most_b, most_a = torch.maximum(b.amax(dim=-1), sigma), torch.maximum(a.amax(dim=-1), rho)
    kept = b[..., :, None] * a[..., None, :] + damping
    along_out = torch.maximum(b * rho + damping, small * b * most_a)
    along_in = torch.maximum(sigma * a + damping, small * most_b * a)
    rest = torch.maximum(sigma * rho + damping, small * torch.maximum(most_b * rho, sigma * most_a))
    return EigenbasisKronecker(u, v, 1 / kept, 1 / along_out, 1 / along_in, 1 / rest)


def _in_eigenspaces(
    output: Diagonal | LowRankPlusDiagonal, input: LowRankPlusIsotropic, damping: float | Tensor, semidefinite: bool
) -> EigenspaceKronecker:
    vectors, a, rho = input
    each = torch.zeros_like(a) + damping
    if not input.is_complete:
        # What rounding leaves of the largest eigenvalues in the rest is not scaled up by more than these are.
        missing = (margin(vectors) * a.amax(dim=-1) - rho).clamp(min=0) * _largest(output)
        each = torch.cat([each, torch.maximum(each[..., :1], missing[..., None])], dim=-1)
        a = torch.cat([a, rho[..., None]], dim=-1)
    if isinstance(output, Diagonal):
        return EigenspaceKronecker(Diagonal(1 / (_outer(a, output.diagonal) + each[..., None])), vectors)
    shifted = LowRankPlusDiagonal(
        output.vectors[..., None, :, :].expand(*a.shape, *output.vectors.shape[-2:]),
        _outer(a, output.values),
        _outer(a, output.diagonal) + each[..., None],
    )
    inverse = semidefinite_inverse(shifted) if semidefinite else differentiable_inverse(shifted)
    return EigenspaceKronecker(inverse, vectors)


def _largest(operator: Diagonal | LowRankPlusDiagonal) -> Tensor:
    """Return a bound of the largest eigenvalue, at most twice as large for orthonormal vectors."""
    largest = operator.diagonal.amax(dim=-1)
    if isinstance(operator, Diagonal):
        return largest
    return largest + (operator.values * operator.vectors.square().sum(dim=-2)).clamp(min=0).amax(dim=-1)


def _outer(a: Tensor, x: Tensor) -> Tensor:
    return a[..., :, None] * x[..., None, :]
