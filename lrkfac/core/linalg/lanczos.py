"""The method of Lanczos: a symmetric matrix in the basis of its Krylov space, in which it is tridiagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_integer
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.actions import SymmetricMap, action, as_stacked, check_vector


class Tridiagonal(NamedTuple):
    """A matrix in the basis of its Krylov space, ``Qᵀ M Q``, as ``lanczos`` returns it.

    Attributes:
        diagonal: ``[m]``.
        off_diagonal: ``[m - 1]``.
        basis: ``Q``: vectors ``[d, m]``, or a tree of leaves ``[m, ...]``.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tree

    def to_dense(self) -> Tensor:
        """Return ``Qᵀ M Q``, ``[m, m]``."""
        return tridiagonal_matrix(self.diagonal, self.off_diagonal)


def lanczos(operator: SymmetricMap, start: Tree, steps: int, reorthogonalize: bool = True) -> Tridiagonal:
    """Return a symmetric matrix as a tridiagonal one in the basis of its Krylov space.

    ``M qⱼ = βⱼ₋₁ qⱼ₋₁ + αⱼ qⱼ + βⱼ qⱼ₊₁`` (Lanczos 1950; Golub & Van Loan, Matrix Computations, section 10.1), with
    every vector made orthogonal to all earlier ones twice. It takes ``steps`` products and holds as many vectors. Where
    the space is exhausted after fewer steps, the rest is zero.

    Args:
        operator: ``M``, symmetric: a function, or an operator with ``matvec`` (where ``start`` is a vector) or
            ``product`` (where it is a tree).
        start: The first vector, of any length: a vector ``[d]`` or a tree.
        steps: Size ``m`` of the tridiagonal matrix, at most ``d``.
        reorthogonalize: Whether vectors are made orthogonal to all earlier ones. Without it, eigenvalues come several
            times, and ``basis`` is not orthonormal.

    Returns:
        A ``Tridiagonal``: ``diagonal`` ``[m]``, ``off_diagonal`` ``[m - 1]`` and ``basis``.

    Raises:
        ValueError: If ``steps`` is below 1 or above ``d``, or shapes do not fit.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, lanczos
        >>> found = lanczos(Diagonal(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3), 3)
        >>> torch.linalg.eigvalsh(found.to_dense()).round(decimals=4)
        tensor([1., 2., 4.])
    """
    first = check_vector(start, "start")
    times = action(operator, start)
    check_integer(steps, "steps")
    check_flag(reorthogonalize, "reorthogonalize")
    if steps > first.shape[0]:
        raise ValueError(f"steps: expected at most {first.shape[0]}, the dimension, got {steps}")
    alphas, betas, basis = krylov(times, first[:, None], steps, reorthogonalize, keep=True)
    return Tridiagonal(alphas[:, 0], betas[:, 0], as_stacked(torch.cat(basis, dim=1), start))


def krylov(
    times: Callable[[Tensor], Tensor], start: Tensor, steps: int, reorthogonalize: bool, keep: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return ``α`` ``[m, s]``, ``β`` ``[m - 1, s]`` and the basis, for ``s`` starts ``[d, s]`` side by side.

    The basis is ``m`` matrices ``[d, s]``, or the last two of them where it is not needed.
    """
    length = torch.linalg.vector_norm(start, dim=0)
    basis = [start / torch.where(length > 0, length, 1)]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    largest = torch.zeros_like(length)
    for j in range(steps):
        image = times(basis[-1])
        alphas.append(torch.linalg.vecdot(basis[-1], image, dim=0))
        image = image - alphas[-1] * basis[-1]
        if betas:
            image = image - betas[-1] * basis[-2]
        if reorthogonalize:
            image = _orthogonal_to(basis, _orthogonal_to(basis, image))
        if j + 1 == steps:
            break
        beta = torch.linalg.vector_norm(image, dim=0)
        largest = torch.maximum(largest, alphas[-1].abs() + beta)
        lost = beta <= 8 * torch.finfo(start.dtype).eps * largest
        betas.append(torch.where(lost, 0, beta))
        following = torch.where(lost, 0, image / torch.where(lost, 1, beta))
        basis = [*(basis if reorthogonalize or keep else basis[-1:]), following]
    empty = length.new_zeros(0, *length.shape)
    return torch.stack(alphas), torch.stack(betas) if betas else empty, basis


def tridiagonal_matrix(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Return the matrix ``[*, m, m]`` with a diagonal ``[*, m]`` and its neighbours ``[*, m - 1]``."""
    beside = torch.diag_embed(off_diagonal, offset=1) + torch.diag_embed(off_diagonal, offset=-1)
    return torch.diag_embed(diagonal) + beside if off_diagonal.shape[-1] else torch.diag_embed(diagonal)


def _orthogonal_to(basis: list[Tensor], x: Tensor) -> Tensor:
    for vector in basis:
        x = x - torch.linalg.vecdot(vector, x, dim=0) * vector
    return x
