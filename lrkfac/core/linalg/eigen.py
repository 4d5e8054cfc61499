"""Dominant eigenvectors of a symmetric matrix known only by its action: stateless iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.arguments import check_function, check_integer, check_number
from lrkfac.core.linalg.bases import orthonormal


def power_iteration(
    matvec: Callable[[Tensor], Tensor],
    start: Float[Tensor, "d k"],
    rank: int | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "r"]]:
    """Return dominant eigenpairs, one vector after another: ``v ← M v / ‖M v‖``, orthogonal to the earlier ones.

    A vector no longer changes once a step turns it by less than ``tolerance``. The number of steps does not
    depend on values, so the function can be compiled and mapped over batches. At the end the
    basis is rotated to the Ritz vectors, which also separates eigenvalues of equal magnitude.

    Args:
        matvec: ``V ↦ M V`` for ``V`` of shape ``[d, j]``, with ``M`` symmetric, definite or not.
        start: Initial guess of each vector, ``[d, k]`` with ``k ≥ rank``; any columns, zeros included.
        rank: Number of eigenpairs ``r``, at most ``d``; by default the columns of ``start``.
        max_iterations: Steps for each vector.
        tolerance: Sine of the angle between a vector and its image below which it has converged.

    Returns:
        Orthonormal vectors ``[d, r]`` (to rounding, whatever ended the iteration) and the Ritz
        values ``[r]``, largest magnitude first.

    Raises:
        ValueError: If ``rank`` or ``max_iterations`` is below 1 or ``start`` has too few rows or columns.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import power_iteration
        >>> M = torch.diag(torch.tensor([1.0, 5.0, 2.0]))
        >>> vectors, values = power_iteration(lambda v: M @ v, torch.ones(3, 2) + torch.eye(3)[:, :2])
        >>> values.round(decimals=3)
        tensor([5., 2.])
    """
    rank = _check(matvec, start, rank, max_iterations=max_iterations)
    check_number(tolerance, "tolerance", 0)
    vectors = start[:, :0]
    for i in range(rank):
        vector = orthonormal(torch.cat([vectors, start[:, i : i + 1]], dim=1))[:, i:]
        converged = torch.zeros((), dtype=torch.bool, device=start.device)
        for _ in range(max_iterations):
            image = matvec(vector)
            rest = _deflate(_deflate(image, vectors), vectors)
            norm = torch.linalg.vector_norm(rest)
            # Where the image lies within the earlier vectors, only rounding is left of it: stand still.
            lost = norm <= 8 * torch.finfo(start.dtype).eps * torch.linalg.vector_norm(image)
            candidate = rest / torch.where(lost, 1.0, norm)
            cosine = (candidate * vector).sum()
            turned = torch.linalg.vector_norm(candidate - cosine * vector)
            vector = torch.where(converged | lost, vector, candidate)
            converged = converged | lost | (turned <= tolerance)
        vectors = torch.cat([vectors, vector], dim=1)
    return rayleigh_ritz(matvec, orthonormal(vectors), rank)


def subspace_iteration(
    matvec: Callable[[Tensor], Tensor],
    start: Float[Tensor, "d k"],
    rank: int | None = None,
    iterations: int = 1,
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "r"]]:
    """Return dominant eigenpairs, all vectors at once: ``Q ← orthonormal(M Q)``, then a Rayleigh–Ritz step.

    Columns of ``start`` beyond ``rank`` speed up convergence (Halko, Martinsson & Tropp 2011, arXiv
    0909.4061, algorithm 4.4). ``start`` may be the last result, which one iteration then renews.

    Args:
        matvec: ``V ↦ M V`` for ``V`` of shape ``[d, j]``, with ``M`` symmetric, definite or not.
        start: Initial guess of the space, ``[d, k]`` with ``rank ≤ k ≤ d``.
        rank: Number of eigenpairs ``r``; by default the columns of ``start``.
        iterations: Products with ``M`` before the Rayleigh–Ritz step, which needs one more.

    Returns:
        Orthonormal vectors ``[d, r]`` and the Ritz values ``[r]``, largest magnitude first.

    Raises:
        ValueError: If ``rank`` or ``iterations`` is below 1 or ``start`` has too few rows or columns.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import subspace_iteration
        >>> M = torch.diag(torch.tensor([1.0, 5.0, 2.0]))
        >>> start = torch.ones(3, 2) + torch.eye(3)[:, :2]
        >>> vectors, values = subspace_iteration(lambda v: M @ v, start, iterations=20)
        >>> values.round(decimals=3)
        tensor([5., 2.])
    """
    rank = _check(matvec, start, rank, iterations=iterations)
    basis = start / torch.linalg.vector_norm(start, dim=0).clamp(min=torch.finfo(start.dtype).tiny)
    for _ in range(iterations):
        basis = orthonormal(matvec(basis))
    return rayleigh_ritz(matvec, basis, rank)


def rayleigh_ritz(
    matvec: Callable[[Tensor], Tensor], basis: Float[Tensor, "d k"], rank: int
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "r"]]:
    """Return the best eigenpairs within the span of an orthonormal basis ``Q``, from ``Qᵀ M Q``.

    Returns:
        The ``rank`` Ritz pairs of largest magnitude, in that order.
    """
    values, rotation = ritz(basis.mT @ matvec(basis))
    order = values.abs().argsort(descending=True)[:rank]
    return basis @ rotation[:, order], values[order]


class Eigenpairs(NamedTuple):
    """Eigenvalues ``[*, k]`` of symmetric matrices, rising, and their eigenvectors ``[*, k, k]``."""

    values: Tensor
    vectors: Tensor


def ritz(projected: Float[Tensor, "*many k k"]) -> Eigenpairs:
    """Return the eigenpairs of ``Qᵀ M Q``."""
    return Eigenpairs(*torch.linalg.eigh(without_subnormal((projected + projected.mT) / 2)))


def ritz_of_all(projections: Any) -> Any:
    """Return a tree with ``ritz`` of each leaf: those of one size in one call, for which a GPU waits once."""
    leaves, structure = optree.tree_flatten(projections)
    alike: dict[Any, list[int]] = {}
    for i, matrix in enumerate(leaves):
        alike.setdefault((matrix.shape[-1], matrix.dtype, matrix.device), []).append(i)
    pairs: dict[int, Eigenpairs] = {}
    for numbers in alike.values():
        stacks = [leaves[i].flatten(0, -3) if leaves[i].ndim > 2 else leaves[i][None] for i in numbers]
        values, vectors = ritz(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
        vectors = vectors.contiguous()  # rounding of their products depends on it: of one matrix as of that in a stack
        sizes = [len(stack) for stack in stacks]
        for i, *both in zip(numbers, values.split(sizes), vectors.split(sizes), strict=True):
            many = leaves[i].shape[:-2]
            pairs[i] = Eigenpairs(*[x.unflatten(0, many) if many else x[0] for x in both])
    return optree.tree_unflatten(structure, [pairs[i] for i in range(len(leaves))])


def without_subnormal(matrix: Float[Tensor, "*many k k"]) -> Float[Tensor, "*many k k"]:
    """Return the matrix with 0 for entries far below its rounding: subnormal numbers become NaN in LAPACK's eigh."""
    limits, sizes = torch.finfo(matrix.dtype), matrix.abs()
    smallest = (limits.eps**2 * sizes.amax(dim=(-2, -1), keepdim=True)).clamp(min=limits.tiny)
    return matrix.masked_fill(sizes < smallest, 0)


def _deflate(x: Tensor, vectors: Tensor) -> Tensor:
    return x - vectors @ (vectors.mT @ x)


def _check(matvec: Callable[[Tensor], Tensor], start: Tensor, rank: int | None, **iterations: int) -> int:
    check_function(matvec, "matvec")
    if not isinstance(start, Tensor) or not start.is_floating_point():
        got = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"start: expected a floating-point tensor [d, k], got {got}")
    if start.ndim != 2 or not start.numel():
        raise ValueError(f"start: expected vectors [d, k], got the shape {tuple(start.shape)}")
    d, k = start.shape
    rank = k if rank is None else rank
    check_integer(rank, "rank")
    for name, value in iterations.items():
        check_integer(value, name)
    if not 1 <= rank <= min(d, k):
        raise ValueError(
            f"rank: expected 1 <= rank <= {min(d, k)} for a start of shape {(d, k)}, got {rank}; "
            "give as many start columns as vectors are wanted, and no more vectors than rows"
        )
    return rank
