"""The method of Lanczos: a symmetric matrix in the basis of its Krylov space, in which it is tridiagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_integer
from lrkfac.core.base.autograd import recording
from lrkfac.core.base.eager import changes_in_place
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
    the space is exhausted after fewer steps, the rest is zero. Autograd does not follow it; ``torch.func`` does.

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
    with recording(False):
        alphas, betas, basis = krylov(times, first, steps, reorthogonalize, keep=True)
    return Tridiagonal(alphas, betas, as_stacked(basis.mT, start))


def krylov(
    times: Callable[[Tensor], Tensor], start: Tensor, steps: int, reorthogonalize: bool, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``α`` ``[m]``, ``β`` ``[m - 1]`` and the basis ``[m, d]``, of which nothing is there if not needed."""
    length = torch.linalg.vector_norm(start)
    previous, current = start, start / torch.where(length > 0, length, 1)
    held = reorthogonalize or keep
    # A basis is all that memory may hold: a copy of it for each new vector would take longer than what uses it.
    in_place = held and changes_in_place() and not torch.is_grad_enabled()
    memory = start.new_empty(steps, len(start)) if in_place else None
    basis = start.new_empty(0, len(start))
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    largest = torch.zeros_like(length)
    for j in range(steps):
        basis = _extended(basis, current, memory) if held else basis
        image = times(current)
        alphas.append(torch.dot(current, image))
        image = torch.addcmul(image, current, -alphas[-1])
        if betas:
            image = torch.addcmul(image, previous, -betas[-1])
        for _ in range(2 if reorthogonalize else 0):
            image = image - (basis @ image) @ basis
        if j + 1 == steps:
            break
        beta = torch.linalg.vector_norm(image)
        largest = torch.maximum(largest, alphas[-1].abs() + beta)
        lost = beta <= 8 * torch.finfo(start.dtype).eps * largest
        betas.append(torch.where(lost, 0, beta))
        previous, current = current, torch.where(lost, 0, image / torch.where(lost, 1, beta))
    return torch.stack(alphas), torch.stack(betas) if betas else length.new_zeros(0), basis


def _extended(basis: Tensor, vector: Tensor, memory: Tensor | None) -> Tensor:
    """Return a basis ``[j, d]`` and one more vector, in memory that has room for them if there is some."""
    if memory is None:
        return torch.cat([basis, vector[None]])
    memory[len(basis)] = vector
    return memory[: len(basis) + 1]


def tridiagonal_matrix(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Return the matrix ``[*, m, m]`` with a diagonal ``[*, m]`` and its neighbours ``[*, m - 1]``."""
    beside = torch.diag_embed(off_diagonal, offset=1) + torch.diag_embed(off_diagonal, offset=-1)
    return torch.diag_embed(diagonal) + beside if off_diagonal.shape[-1] else torch.diag_embed(diagonal)
