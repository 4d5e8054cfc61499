"""Refusals of matrices that are not positive definite, where values are known: which eigenvalue it is."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from lrkfac.core.base.eager import has_values
from lrkfac.core.linalg.bases import margin


def check_positive(values: Tensor, name: str, what: str = "eigenvalue") -> None:
    """Raise unless all of these numbers are positive, where they are known.

    Raises:
        ValueError: With the smallest of them and its place.
    """
    if not has_values(values) or bool((values > 0).all()):
        return
    values = values.detach()
    wrong = values.isnan().nonzero() if values.isnan().any() else (values == values.amin()).nonzero()
    place = wrong[0].tolist()
    where = name + (str(place) if place else "")
    _refuse(f"the {what} {float(values[tuple(place)]):.3g}, {where}")


def checked_cholesky(matrix: Tensor, name: str) -> Tensor:
    """Return the lower triangle ``L`` with ``L Lᵀ = M``, one or several stacked; NaN where there is none.

    Raises:
        ValueError: If a matrix is not positive definite to rounding, with its smallest eigenvalue.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    limit = matrix.shape[-1] ** 0.5 * torch.finfo(matrix.dtype).eps
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
    good = (info == 0) & (pivots.amin(dim=-1) > limit * pivots.amax(dim=-1))
    if has_values(good) and not bool(good.all()):
        _check_eigenvalues(matrix.detach(), info, name, limit)
    return torch.where(info[..., None, None] == 0, factor, torch.nan)


def cholesky_with_margin(matrix: Tensor, name: str) -> Tensor:
    """Return what ``checked_cholesky`` does, of the matrix shifted by a few ulps of its norm where pivots ask for it.

    Rounding alone can make a matrix of large condition indefinite.

    Raises:
        ValueError: If a matrix is not positive definite all the same, with its smallest eigenvalue.
    """
    limit = margin(matrix) * matrix.detach().abs().sum(dim=-1).amax(dim=-1)
    factor, info = torch.linalg.cholesky_ex(matrix.detach())
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
    shift = torch.where((info == 0) & (pivots > 4 * limit), 0.0, limit)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix + shift[..., None, None] * identity)
    if has_values(info) and bool(info.any()):
        _check_eigenvalues(matrix.detach(), info, name, 0.0)
    return torch.where(info[..., None, None] == 0, factor, torch.nan)


def _check_eigenvalues(matrix: Tensor, info: Tensor, name: str, limit: float) -> None:
    """Raise if an eigenvalue is at most this share of the largest one, or a factorisation has failed."""
    if not matrix.isfinite().all():
        _refuse(f"entries of {name} that are not finite")
    values = torch.linalg.eigvalsh(matrix).reshape(-1, matrix.shape[-1])
    for each, failed in zip(values, info.reshape(-1).tolist(), strict=True):
        smallest, largest = each[0].item(), each[-1].item()
        if failed or not smallest > limit * largest:
            _refuse(f"the eigenvalue {smallest:.3g} (the largest is {largest:.3g}) of {name}")


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"operator: expected a positive definite matrix, got {what}; add a multiple of the identity: "
        "damped(operator, damping)"
    )
