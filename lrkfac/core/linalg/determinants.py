"""Logarithms of determinants of positive definite operators."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.linalg.custom import method_of
from lrkfac.core.linalg.definite import check_positive, checked_cholesky
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, LowRankPlusIsotropic, TransposedKronecker
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator, TreeOperator
from lrkfac.core.linalg.triangles import triangles


def logdet(operator: Operator | TreeOperator) -> Float[Tensor, ""]:
    """Return the natural logarithm of the determinant, differentiable in the operator's entries.

    For a Kronecker product it is ``d_in log det B + d_out log det A``; of low rank plus diagonal it comes from two
    triangles, in O(d r²). That of ``B ⊗ A + λ I`` is ``logdet(damped(product, λ))``.

    Args:
        operator: A positive definite operator, one of ``lrkfac.linalg`` or a custom one with a method ``logdet()``.

    Returns:
        ``log det M``, ``[]``.

    Raises:
        ValueError: If ``operator`` is indefinite or singular (which eigenvalue), where values are known, or its entries
            do not fit together.
        TypeError: If ``operator`` is no operator, or a custom one without the method.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, Kronecker, damped, logdet
        >>> one = Diagonal(torch.tensor([1.0, 3.0]))
        >>> logdet(damped(Kronecker(one, one), 1.0)).exp().round()
        tensor(320.)
    """
    custom = method_of(operator, "logdet")
    return custom() if custom else _logdet(operator, "operator")


def eigenvalues(operator: Diagonal | LowRankPlusIsotropic | EigenbasisKronecker, name: str) -> dict[str, Tensor]:
    """Return the entries of an operator that are its eigenvalues, by name; raise unless those that count are positive.

    Raises:
        ValueError: If one that counts is not positive.
    """
    values = {field: getattr(operator, field) for field in _times(operator)}
    for field, times in _times(operator).items():
        if times:
            check_positive(values[field], f"{name}.{field}")
    return values


def _times(operator: Diagonal | LowRankPlusIsotropic | EigenbasisKronecker) -> dict[str, int]:
    """Return for each entry that holds eigenvalues how often each of them counts."""
    if isinstance(operator, Diagonal):
        return {"diagonal": 1}
    if isinstance(operator, LowRankPlusIsotropic):
        d, r = operator.vectors.shape[-2:]
        return {"values": 1, "rest": d - r}
    more_out, more_in = (v.shape[-2] - v.shape[-1] for v in (operator.output_vectors, operator.input_vectors))
    return {"kept": 1, "output": more_in, "input": more_out, "rest": more_out * more_in}


def _logdet(operator: Any, name: str) -> Tensor:
    """Return the logarithm of the determinant, also of stacked ones."""
    if isinstance(operator, Kronecker):
        sides = []
        for side in ("output", "input"):
            custom = method_of(factor := getattr(operator, side), "logdet")
            sides.append(custom() if custom else _logdet(factor, f"{name}.{side}"))
        return operator.input.dimension * sides[0] + operator.output.dimension * sides[1]
    if isinstance(operator, LowRankPlusDiagonal):
        return triangles(operator, name).logdet().to(operator.vectors.dtype)
    if isinstance(operator, Dense):
        lower = checked_cholesky(operator.matrix, name)
        return 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    if isinstance(operator, EigenspaceKronecker):
        each, (d, r) = _logdet(operator.output, f"{name}.output"), operator.input_vectors.shape
        return each[:r].sum() + (d - r) * each[r:].sum()
    if isinstance(operator, TransposedKronecker):
        return _logdet(operator.transposed, f"{name}.transposed")
    values = eigenvalues(operator, name)
    logs = [times * _total(values[field].log(), field) for field, times in _times(operator).items() if times]
    return torch.stack(logs).sum(dim=0)


def _total(x: Tensor, field: str) -> Tensor:
    """Return the sum of the numbers of one operator."""
    axes = {"kept": (-2, -1), "rest": ()}.get(field, (-1,))
    return x.sum(dim=axes) if axes else x
