"""Roots of positive definite operators and what comes of them: draws of a normal distribution, solutions."""

from __future__ import annotations

from typing import Any

import torch

from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.custom import check_vectors, method_of
from lrkfac.core.linalg.definite import checked_cholesky
from lrkfac.core.linalg.determinants import eigenvalues
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, TransposedKronecker
from lrkfac.core.linalg.operators import Dense, Kronecker, LowRankPlusDiagonal, Operator, TreeOperator
from lrkfac.core.linalg.roots import (
    DenseRoot,
    EigenspaceRoot,
    KroneckerRoot,
    LowRankRoot,
    Root,
    SymmetricRoot,
    TransposedRoot,
)
from lrkfac.core.linalg.triangles import inverse_of_triangle, triangles


def root(operator: Operator | TreeOperator) -> Root:
    """Return ``S`` with ``S Sᵀ = M``.

    Args:
        operator: A positive definite operator, one of ``lrkfac.linalg`` or a custom one with a method ``root()``.

    Returns:
        A NamedTuple with ``matvec(x)``, which returns ``S x`` for ``x`` of shape ``[k]`` or ``[k, n]``,
        ``rmatvec(y)``, which returns ``Sᵀ y``, ``to_dense()``, and ``shape``, ``(d, k)``. For the package's operators
        ``k = d``.

    Raises:
        ValueError: If ``operator`` is indefinite or singular (which eigenvalue), where values are known, or its entries
            do not fit together.
        TypeError: If ``operator`` is no operator, or a custom one without the method.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, root
        >>> root(Diagonal(torch.tensor([4.0, 9.0]))).matvec(torch.ones(2))
        tensor([2., 3.])
    """
    custom = method_of(operator, "root")
    return custom() if custom else _root(operator, "operator", inverted=False)


def inverse_root(operator: Operator | TreeOperator) -> Root:
    """Return ``S`` with ``S Sᵀ = M⁻¹``, the transposed inverse of ``root(operator)``.

    More precise than the root of the inverse: no inverse is made.

    Args:
        operator: A positive definite operator, one of ``lrkfac.linalg`` or a custom one with a method
            ``inverse_root()``.

    Returns:
        As for ``root``.

    Raises:
        ValueError: If ``operator`` is indefinite or singular (which eigenvalue), where values are known, or its entries
            do not fit together.
        TypeError: If ``operator`` is no operator, or a custom one without the method.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, inverse_root
        >>> inverse_root(Diagonal(torch.tensor([4.0, 0.25]))).matvec(torch.ones(2))
        tensor([0.5000, 2.0000])
    """
    custom = method_of(operator, "inverse_root")
    return custom() if custom else _root(operator, "operator", inverted=True)


def sample(operator: Operator | TreeOperator, noise: Tree) -> Tree:
    """Return draws of the normal distribution ``N(0, M)``: ``root(operator)`` times standard normal numbers.

    Draws of ``N(0, M⁻¹)``, as of a Laplace posterior, are ``inverse_root(operator).matvec(noise)``.

    Args:
        operator: As for ``root``.
        noise: Standard normal numbers, ``[k]`` for one draw or ``[k, n]`` for ``n``, where ``k`` is the number of
            columns of the root: ``d`` for the package's operators.

    Returns:
        One draw ``[d]``, or ``n`` as columns ``[d, n]``; of an operator on trees, a tree like ``noise``.

    Raises:
        ValueError: If ``operator`` is indefinite or singular (which eigenvalue), where values are known, its entries do
            not fit together, or the shape or device of ``noise`` does not fit.
        TypeError: If ``operator`` is no operator, or a custom one without a method ``root()``, or ``noise`` is no
            tensor of the operator's dtype.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, sample
        >>> draws = sample(Diagonal(torch.tensor([4.0, 9.0])), torch.randn(2, 1000))
        >>> draws.shape
        torch.Size([2, 1000])
    """
    custom = method_of(operator, "sample", or_else="root")
    if custom:
        return custom(noise)
    check_vectors(operator, noise, "noise")
    return root(operator).matvec(noise)


def solve(operator: Operator | TreeOperator, b: Tree) -> Tree:
    """Return ``M⁻¹ b``, by ``inverse_root``.

    For many calls with one operator make ``inverse(operator)`` once, and use its ``matvec``.

    Args:
        operator: As for ``inverse_root``.
        b: Right-hand sides, ``[d]`` or ``[d, n]``.

    Returns:
        The solutions, of the shape of ``b``.

    Raises:
        ValueError: If ``operator`` is indefinite or singular (which eigenvalue), where values are known, its entries do
            not fit together, or the shape or device of ``b`` does not fit.
        TypeError: If ``operator`` is no operator, or a custom one without a method ``inverse_root()``, or ``b`` is no
            tensor of the operator's dtype.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, solve
        >>> solve(Diagonal(torch.tensor([4.0, 2.0])), torch.ones(2))
        tensor([0.2500, 0.5000])
    """
    custom = method_of(operator, "solve", or_else="inverse_root")
    if custom:
        return custom(b)
    check_vectors(operator, b, "b")
    half = inverse_root(operator)
    return half.matvec(half.rmatvec(b))


def _root(operator: Any, name: str, inverted: bool) -> Any:
    """Return the root of an operator or of its inverse, also of stacked ones."""
    if isinstance(operator, Kronecker):
        return KroneckerRoot(*[_of_factor(operator, side, name, inverted) for side in ("output", "input")])
    if isinstance(operator, LowRankPlusDiagonal):
        found = triangles(operator, name)
        half = found.inverse_root() if inverted else found.root()
        return LowRankRoot(*[x.to(operator.vectors.dtype) for x in half])
    if isinstance(operator, Dense):
        lower = checked_cholesky(operator.matrix, name)
        return DenseRoot(inverse_of_triangle(lower).mT if inverted else lower)
    if isinstance(operator, EigenspaceKronecker):
        return EigenspaceRoot(_root(operator.output, f"{name}.output", inverted), operator.input_vectors)
    if isinstance(operator, TransposedKronecker):
        return TransposedRoot(_root(operator.transposed, f"{name}.transposed", inverted))
    power = torch.rsqrt if inverted else torch.sqrt
    return SymmetricRoot(operator._replace(**{field: power(x) for field, x in eigenvalues(operator, name).items()}))


def _of_factor(product: Kronecker, side: str, name: str, inverted: bool) -> Any:
    factor = getattr(product, side)
    custom = method_of(factor, "inverse_root" if inverted else "root")
    return custom() if custom else _root(factor, f"{name}.{side}", inverted)
