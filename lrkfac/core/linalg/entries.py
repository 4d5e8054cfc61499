"""Multiples, traces, diagonals and quadratic forms of operators."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.custom import check_vectors, method_of
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, LowRankPlusIsotropic, TransposedKronecker
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator, TreeOperator


def scale(operator: Operator | TreeOperator, c: float | Tensor) -> Operator:
    """Return ``c M`` as an operator of the same class.

    Args:
        operator: One of ``lrkfac.linalg``, or a custom one with a method ``scale(c)``.
        c: A finite number or a tensor ``[]``.

    Returns:
        The multiple. Of a Kronecker product, the output factor is scaled.

    Raises:
        ValueError: If ``c`` is not finite or no number ``[]``, or the entries of ``operator`` do not fit together.
        TypeError: If ``operator`` is no operator, or a custom one without the method, or ``c`` is no real number.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, scale
        >>> scale(Diagonal(torch.tensor([1.0, 2.0])), 3.0).diagonal
        tensor([3., 6.])
    """
    check_number(c, "c")
    custom = method_of(operator, "scale")
    return custom(c) if custom else _scaled(operator, c)


def trace(operator: Operator | TreeOperator) -> Float[Tensor, ""]:
    """Return the sum of the eigenvalues.

    Args:
        operator: One of ``lrkfac.linalg``, or a custom one with a method ``trace()``.

    Returns:
        The trace, ``[]``.

    Raises:
        ValueError: If the entries of ``operator`` do not fit together.
        TypeError: If ``operator`` is no operator, or a custom one without the method.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, trace
        >>> trace(Diagonal(torch.tensor([1.0, 2.0])))
        tensor(3.)
    """
    total: Tensor = (method_of(operator, "trace") or operator.trace)()  # type: ignore[union-attr]
    return total


def diagonal(operator: Operator | TreeOperator) -> Tree:
    """Return the diagonal of the matrix, without forming it.

    Args:
        operator: One of ``lrkfac.linalg``, or a custom one with a method ``diagonal()``.

    Returns:
        The diagonal, ``[d]``; of an operator on trees, such as ``curvature.from_state`` returns, a tree.

    Raises:
        ValueError: If the entries of ``operator`` do not fit together.
        TypeError: If ``operator`` is no operator, or a custom one without the method.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import LowRankPlusDiagonal, diagonal
        >>> diagonal(LowRankPlusDiagonal(torch.ones(3, 1), torch.tensor([2.0]), torch.arange(3.0)))
        tensor([2., 3., 4.])
    """
    custom = method_of(operator, "diagonal")
    return custom() if custom else _diagonal(operator)


def quadratic_form(operator: Operator | TreeOperator, x: Tree) -> Tensor:
    """Return ``xᵀ M x``.

    Args:
        operator: One of ``lrkfac.linalg``, or a custom one with ``matvec``, or with a method ``quadratic_form(x)``.
        x: One vector ``[d]``, or columns ``[d, n]``.

    Returns:
        One number ``[]``, or one for each column, ``[n]``.

    Raises:
        ValueError: If the entries of ``operator`` do not fit together, or the shape or device of ``x`` does not fit.
        TypeError: If ``operator`` is no operator, or ``x`` is no tensor of the operator's dtype.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, quadratic_form
        >>> quadratic_form(Diagonal(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
        tensor(9.)
    """
    custom = method_of(operator, "quadratic_form", or_else="matvec")
    if custom:
        return custom(x)
    check_vectors(operator, x, "x")
    return (x * operator.matvec(x)).sum(dim=0)


def _scaled(operator: Any, c: float | Tensor) -> Any:
    if isinstance(operator, Kronecker):
        return operator._replace(output=scale(operator.output, c))
    if isinstance(operator, EigenspaceKronecker):
        return operator._replace(output=_scaled(operator.output, c))
    if isinstance(operator, TransposedKronecker):
        return TransposedKronecker(_scaled(operator.transposed, c))
    vectors = ("vectors", "output_vectors", "input_vectors")
    return operator._replace(**{field: c * x for field, x in operator._asdict().items() if field not in vectors})


def _diagonal(operator: Any) -> Tensor:
    """Return the diagonal, ``[*, d]``, of a matrix or of several stacked ones."""
    if isinstance(operator, Diagonal):
        return operator.diagonal
    if isinstance(operator, Dense):
        return operator.matrix.diagonal(dim1=-2, dim2=-1)
    if isinstance(operator, LowRankPlusDiagonal):
        return operator.diagonal + (operator.vectors.square() @ operator.values[..., None])[..., 0]
    if isinstance(operator, LowRankPlusIsotropic):
        along, beside = _shares(operator.vectors)
        return (along @ operator.values[..., None])[..., 0] + operator.rest[..., None] * beside
    if isinstance(operator, TransposedKronecker):
        d_in = operator.transposed.output.dimension
        return _diagonal(operator.transposed).reshape(d_in, -1).mT.reshape(-1)
    if isinstance(operator, Kronecker):
        return _outer(diagonal(operator.output), diagonal(operator.input))
    along, beside = _shares(operator.input_vectors)
    if isinstance(operator, EigenspaceKronecker):
        each, r = _diagonal(operator.output), operator.input_vectors.shape[-1]
        total = each[:r].mT @ along.mT
        return (total if operator.is_complete else total + each[r][:, None] * beside).reshape(-1)
    assert isinstance(operator, EigenbasisKronecker)
    along_out, beside_out = _shares(operator.output_vectors)
    total = along_out @ operator.kept @ along.mT
    total = total + _outer(along_out @ operator.output, beside).reshape(total.shape)
    total = total + _outer(beside_out, along @ operator.input).reshape(total.shape)
    return (total + operator.rest * _outer(beside_out, beside).reshape(total.shape)).reshape(-1)


def _shares(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each unit vector the shares of its square along orthonormal ones, ``[*, d, r]``, and beside them."""
    along = vectors.square()
    if vectors.shape[-1] == vectors.shape[-2]:
        return along, along.new_zeros(along.shape[:-1])
    return along, (1 - along.sum(dim=-1)).clamp(min=0)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] * y).reshape(-1)
