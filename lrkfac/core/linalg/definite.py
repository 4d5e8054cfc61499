"""Refusals of matrices that are not positive definite, where values are known: which eigenvalue it is."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from lrkfac.core.base.eager import has_values


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
    if has_values(matrix):
        pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
        limit = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
        if not bool(((info == 0) & (pivots.amin(dim=-1) > limit * pivots.amax(dim=-1))).all()):
            _check_eigenvalues(matrix.detach(), name, limit)
    return torch.where(info[..., None, None] == 0, factor, torch.nan)


def _check_eigenvalues(matrix: Tensor, name: str, limit: float) -> None:
    if not matrix.isfinite().all():
        _refuse(f"entries of {name} that are not finite")
    values = torch.linalg.eigvalsh(matrix).reshape(-1, matrix.shape[-1])
    for smallest, largest in zip(values[:, 0].tolist(), values[:, -1].tolist(), strict=True):
        if not smallest > limit * largest:
            _refuse(f"the eigenvalue {smallest:.3g} (the largest is {largest:.3g}) of {name}")


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"operator: expected a positive definite matrix, got {what}; add a multiple of the identity: "
        "damped(operator, damping)"
    )
