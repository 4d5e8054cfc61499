"""Products ``B [X c] A`` of a matrix with operators from both sides, with its last column ``c``, of a bias, apart.

Operators, matrices and columns may be stacked along leading axes. Nothing as large as ``X`` is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrkfac.core.base.eager import changes_in_place
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator

STACKABLE = (Dense, Diagonal, LowRankPlusDiagonal)
"""Operators whose products with matrices map over leading axes by themselves."""


def two_sided(both: Kronecker, x: Tensor, column: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``output [x column] input``, again with the last column apart; ``None`` if there is none.

    For ``(D + V Λ Vᵀ) X (E + U Μ Uᵀ)`` with two operators of low rank, ``C = (D + V Λ Vᵀ) X U Μ`` is thin, and the
    rest is ``D X E + V (Λ Vᵀ X E) + C Uᵀ``: two passes over the matrix, and one product of inner dimension ``2 r``
    added in place.

    Args:
        both: Of ``[d_out, d_out]`` and ``[d_in, d_in]``.
        x: ``[*, d_out, d_in]``, or one column less.
        column: ``[*, d_out]``.
    """
    output, input = both
    if not isinstance(output, LowRankPlusDiagonal) or not isinstance(input, LowRankPlusDiagonal):
        mixed = None if column is None else of_columns(output, column[..., None]).squeeze(-1)
        return of_rows(input, of_columns(output, x), mixed)
    vectors, last = _split(input, column is not None)
    weights = input.diagonal if column is None else input.diagonal[..., :-1]
    along = x @ vectors
    if last is not None and column is not None:
        along = torch.addcmul(along, column[..., None], last)
    along = of_columns(output, along) * input.values[..., None, :]
    scaled = output.values[..., None] * (output.vectors.mT @ x) * weights[..., None, :]
    left, right = torch.cat([output.vectors, along], dim=-1), torch.cat([scaled, vectors.mT], dim=-2)
    total = added(_diagonal_times(output.diagonal, x, weights, input.diagonal[..., :1]), left, right)
    if last is None or column is None:
        return total, None
    scaled_column = of_columns(output, column[..., None]) * input.diagonal[..., -1:, None]
    return total, (scaled_column + along @ last.mT).squeeze(-1)


def of_rows(operator: Operator, x: Tensor, column: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``[x column] M``, the operator applied to each row, with the last column apart.

    Args:
        operator: ``[d, d]``.
        x: ``[*, n, d]``, or one column less.
        column: ``[*, n]``, or ``[]`` for a constant.
    """
    if column is None:
        return operator.of_rows(x), None
    if isinstance(operator, Diagonal):
        entries = operator.diagonal
        return x * entries[..., None, :-1], (column * entries[..., -1:]).expand(x.shape[:-1])
    if not isinstance(operator, LowRankPlusDiagonal):
        product = operator.of_rows(torch.cat([x, column.expand(x.shape[:-1])[..., None]], dim=-1))
        return product[..., :-1], product[..., -1]
    vectors, last = _split(operator, True)
    assert last is not None
    along = (x @ vectors + column[..., None] * last) * operator.values[..., None, :]
    rows = torch.addcmul(along @ vectors.mT, x, operator.diagonal[..., None, :-1])
    return rows, (along @ last.mT).squeeze(-1) + column * operator.diagonal[..., -1:]


def of_columns(operator: Operator, x: Tensor) -> Tensor:
    """Return ``M x`` for ``x`` ``[*, d, k]``."""
    if isinstance(operator, Diagonal):
        return operator.diagonal[..., None] * x
    if isinstance(operator, LowRankPlusDiagonal):
        inner = operator.values[..., None] * (operator.vectors.mT @ x)
        return torch.addcmul(operator.vectors @ inner, operator.diagonal[..., None], x)
    return operator.matvec(x)


def _split(operator: LowRankPlusDiagonal, last: bool) -> tuple[Tensor, Tensor | None]:
    """Return the vectors, with the last row ``[*, 1, r]`` apart."""
    vectors = operator.vectors
    return (vectors[..., :-1, :], vectors[..., -1:, :]) if last else (vectors, None)


def _diagonal_times(left: Tensor, x: Tensor, right: Tensor, unit: Tensor) -> Tensor:
    """Return ``diag(left) x diag(right)``, in one pass where ``right`` repeats one number.

    Over ``unit``, that number, they are 1: rounding does not depend on how they lie in memory, which may be another way
    in a state that was saved and loaded.
    """
    total = x * (left * unit)[..., None]
    if right.stride(-1) == 0:
        return total
    relative = (right / unit)[..., None, :]
    return total.mul_(relative) if changes_in_place() else total * relative


def added(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``total + left right``, in place of ``total``, which nothing else may hold."""
    if total.ndim > 3:
        return total + left @ right
    if changes_in_place():
        return total.addmm_(left, right) if total.ndim == 2 else total.baddbmm_(left, right)
    return (torch.addmm if total.ndim == 2 else torch.baddbmm)(total, left, right)
