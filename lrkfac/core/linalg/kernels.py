"""Damped equations with a kernel: as many unknowns as there are samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 4.0
"""The least damping of a kernel, in rounding errors of its trace."""


def solve_damped(kernel: Float[Tensor, "n n"], damping: Float[Tensor, ""], b: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return ``(K + max(δ, 4 ε tr K) I)⁻¹ b`` for a positive semidefinite ``K``, by a Cholesky factorization.

    The bound, with the machine precision ``ε``, lies above the rounding errors of the eigenvalues of ``K``, so that the
    factor exists also where ``K`` is singular: no value is looked at. The trace bounds the largest eigenvalue.

    Args:
        kernel: ``K``; its lower half counts.
        damping: ``δ``.
        b: The right-hand side.
    """
    floor = FLOOR * torch.finfo(kernel.dtype).eps * kernel.diagonal().sum()
    shift = torch.maximum(damping.to(kernel.dtype), floor)
    factor, _ = torch.linalg.cholesky_ex(kernel + torch.diag(shift.expand(kernel.shape[0])))
    return torch.cholesky_solve(b[:, None], factor)[:, 0]
