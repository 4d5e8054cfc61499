"""Extreme eigenpairs of a symmetric matrix by a block Krylov space that is restarted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_choice, check_integer, check_number
from lrkfac.core.base.eager import may_be_read
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.actions import SymmetricMap, action, as_columns, as_stacked
from lrkfac.core.linalg.bases import orthonormal
from lrkfac.core.linalg.eigen import ritz


class ExtremeEigenpairs(NamedTuple):
    """The result of ``eigenvalues``.

    Attributes:
        values: ``[r]``, those that were asked for first.
        vectors: Orthonormal: ``[d, r]``, or a tree of leaves ``[r, ...]``.
        residuals: ``‖M v - value v‖`` of each, ``[r]``: an eigenvalue is as near.
        products: Number of products, int64 ``[]``.
    """

    values: Tensor
    vectors: Tree
    residuals: Tensor
    products: Tensor


def eigenvalues(
    operator: SymmetricMap,
    start: Tree,
    rank: int | None = None,
    which: str = "magnitude",
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    max_vectors: int | None = None,
) -> ExtremeEigenpairs:
    """Return extreme eigenpairs of a symmetric matrix.

    A basis begins with ``start`` and grows by the residuals of the Ritz vectors that have not converged: a block Krylov
    space (Musco & Musco 2015, arXiv 1504.05477), restarted from the best Ritz vectors where it has ``max_vectors`` (the
    method of Davidson without a preconditioner, which equals thick-restart Lanczos: Wu & Simon 2000). All vectors are
    kept orthonormal. ``torch.lobpcg`` takes only tensors, no products; ``scipy.sparse.linalg.eigsh`` works on
    ``as_scipy()``, on the host, and finds an eigenvalue of higher multiplicity once for each restart.

    Args:
        operator: The matrix: a function, or an operator with ``matvec`` or ``product``.
        start: Initial guess, such as random vectors: ``[d, k]``, or a tree of leaves ``[k, ...]``, with ``k >= rank``.
            Eigenvalues of multiplicity up to ``k`` are found.
        rank: Number of eigenpairs ``r``; by default ``k``.
        which: ``"magnitude"`` (largest first), ``"largest"`` or ``"smallest"``, as real numbers.
        tolerance: Largest accepted residual, as a share of the largest Ritz value in magnitude.
        max_iterations: Maximum number of blocks of products; all are taken inside ``torch.func`` and ``torch.compile``.
        max_vectors: Vectors of the basis before a restart; twice as many are held. By default the larger of 30 and
            ``4 k``.

    Returns:
        ``ExtremeEigenpairs``: ``values``, ``vectors``, ``residuals`` and the number of ``products``.

    Raises:
        ValueError: If a number or name is out of range, or shapes do not fit.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, eigenvalues
        >>> M = Diagonal(torch.cat([torch.linspace(0, 1, 50), torch.tensor([5.0, -7.0, 5.0])]))
        >>> found = eigenvalues(M, torch.randn(53, 3))
        >>> found.values.round(decimals=3)
        tensor([-7.,  5.,  5.])
    """
    columns, like = as_columns(start, "start")
    times = action(operator, like)
    d, k = columns.shape
    rank = k if rank is None else rank
    check_integer(rank, "rank")
    check_choice(which, "which", ("magnitude", "largest", "smallest"))
    check_number(tolerance, "tolerance", 0)
    check_integer(max_iterations, "max_iterations")
    if not 1 <= k <= d:
        raise ValueError(f"start: expected 1 to {d} vectors, the dimension, got {k}")
    if rank > k:
        raise ValueError(f"rank: expected at most {k}, the vectors of start, got {rank}")
    limit = max(30, 4 * k) if max_vectors is None else max_vectors
    check_integer(limit, "max_vectors")
    if limit < 2 * k:
        raise ValueError(f"max_vectors: expected at least {2 * k}, twice the vectors of start, got {limit}")
    search = _Search(times, k, rank, which, tolerance, limit)
    values, vectors, residuals, products = search.run(columns, max_iterations)
    count = torch.full((), products, dtype=torch.int64, device=columns.device)
    return ExtremeEigenpairs(values, as_stacked(vectors, like), residuals, count)


@dataclass(frozen=True)
class _Search:
    times: Callable[[Tensor], Tensor]
    block: int
    rank: int
    which: str
    tolerance: float
    limit: int

    def run(self, start: Tensor, max_iterations: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return values, vectors, residuals and the number of products."""
        basis = orthonormal(start)
        images = self.times(basis)
        products = self.block
        for i in range(max_iterations):
            values, rotation, magnitude = self._best(basis, images)
            vectors, rest = basis @ rotation, images @ rotation
            rest = rest - vectors * values
            lengths = torch.linalg.vector_norm(rest, dim=0)
            room = basis.shape[0] - basis.shape[1]
            if i + 1 == max_iterations or room == 0:
                break
            if may_be_read(lengths):
                open_ones = lengths[: self.rank] > self.tolerance * magnitude
                if not bool(open_ones.any()):
                    break
            if basis.shape[1] + self.block > self.limit:
                basis, images = self._restarted(basis, images)
            new = _orthonormal_beside(basis, rest[:, : min(self.block, basis.shape[0] - basis.shape[1])])
            basis, images = torch.cat([basis, new], dim=1), torch.cat([images, self.times(new)], dim=1)
            products += new.shape[1]
        r = self.rank
        return values[:r], vectors[:, :r], lengths[:r], products

    def _best(self, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Ritz values asked for, their vectors in the basis, and the largest magnitude."""
        values, rotation = ritz(basis.mT @ images)
        best = self._order(values)[: self.block]
        return values[best], rotation[:, best], values.abs().amax()

    def _order(self, values: Tensor) -> Tensor:
        by = {"magnitude": values.abs(), "largest": values, "smallest": -values}[self.which]
        return by.argsort(descending=True)

    def _restarted(self, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best half of the Ritz vectors that there is room for, at least a block, and their images."""
        values, rotation = ritz(basis.mT @ images)
        kept = rotation[:, self._order(values)[: max(self.block, (self.limit - self.block) // 2)]]
        return basis @ kept, images @ kept


def _orthonormal_beside(basis: Tensor, columns: Tensor) -> Tensor:
    """Return orthonormal columns of the span, orthogonal to a basis; arbitrary ones where there is nothing left."""
    for _ in range(3):  # of columns that lie within the basis, QR returns others, which are then made orthogonal
        columns = orthonormal(columns - basis @ (basis.mT @ columns))
    return columns
