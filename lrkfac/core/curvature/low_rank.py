"""Factors represented by a few eigenpairs, which start from the last ones; no ``d × d`` matrix is formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_choice, check_integer, check_number
from lrkfac.core.base.dtypes import wide
from lrkfac.core.curvature.factors import no_steps
from lrkfac.core.curvature.iterated import IteratedStructure, Method, Turn, start_rows
from lrkfac.core.curvature.low_rank_states import LowRankPlusDiagonalState, LowRankState
from lrkfac.core.linalg.averages import Average, explained
from lrkfac.core.linalg.bases import orthonormal, pseudo_random
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.eigenspaces import LowRankPlusIsotropic
from lrkfac.core.linalg.inverses import semidefinite_inverse
from lrkfac.core.linalg.operators import LowRankPlusDiagonal

Residual = Literal["isotropic", "none"]


Fit = Literal["alternating", "off_diagonal"]


@dataclass(frozen=True)
class LowRankStructure(IteratedStructure):
    """See ``low_rank``."""

    rank: int
    residual: Residual = "isotropic"
    iterations: int = 1
    method: Method = "subspace"
    weight: float = 1.0
    dense_up_to: int | None = None

    def init(self, dimension: int, like: Tensor) -> LowRankState:
        vectors = _start(dimension, min(self.rank, dimension), like)
        return LowRankState(vectors, vectors.new_zeros(vectors.shape[1]), vectors.new_zeros(()), no_steps(like))

    def operator(self, state: LowRankState) -> LowRankPlusDiagonal:
        return state.operator(self.weight)

    def mean_eigenvalue(self, state: LowRankState) -> Tensor:
        d, r = state.vectors.shape[-2:]
        return torch.add(state.values.sum(dim=-1), state.residual, alpha=self.weight * (d - r)) / d

    def eigenpairs(self, state: LowRankState) -> LowRankPlusIsotropic:
        """Return the average as eigenpairs and one number for all other directions."""
        return state.eigenpairs(self.weight)

    def inverse(self, state: LowRankState, damping: float | Tensor) -> LowRankPlusDiagonal:
        # Orthonormal vectors and a multiple of the identity: the inverse has the same vectors.
        # In float32 the damping is at least 4e-6 of the largest eigenvalue; below is only rounding.
        margin = 32 * torch.finfo(state.vectors.dtype).eps
        residual = self.weight * state.residual
        damping = torch.clamp(margin * state.values.amax(dim=-1) - residual, min=damping)
        residual, damping = residual[..., None], damping[..., None]
        rest = residual + damping
        shrinkage = (state.values - residual) / (state.values + damping)
        values = -shrinkage.clamp(max=1 - margin) / rest
        return LowRankPlusDiagonal(state.vectors, values, (1 / rest).expand(state.vectors.shape[:-1]))

    def size(self, dimension: int) -> int:
        r = min(self.rank, dimension)
        return 2 * (dimension * r + r) + 1 + dimension

    def description(self) -> str:
        return f"rank {self.rank}"

    def _whole(self, covariance: Covariance) -> Tensor:
        return covariance.trace()

    def _previous(self, state: LowRankState, kept: Tensor) -> tuple[Average, Tensor, Tensor]:
        d, r = state.vectors.shape[-2:]
        values, residual = kept[..., None] * state.values, kept * state.residual
        whole, residual = torch.add(values.sum(dim=-1), residual, alpha=d - r), residual[..., None]
        return Average(state.vectors, values - residual, residual, 1 - kept), whole, residual

    def _with_whole(self, carry: Turn, whole: Tensor) -> Turn:
        return carry._replace(whole=carry.whole + carry.average.weight * whole)

    def _rest(self, carry: Turn) -> None:
        # A multiple of the identity changes no eigenvector, and without it, iterations converge faster.
        return None

    def _after(self, carry: Turn, vectors: Tensor, values: Tensor, turn: int) -> Turn | LowRankState:
        steps, (d, r) = carry.state.steps, vectors.shape[-2:]
        values = (values + carry.less).clamp(min=0)
        if turn < self.iterations:
            return carry._replace(rows=start_rows(vectors, steps + turn))
        missed = (carry.whole - values.sum(dim=-1)).clamp(min=0)
        isotropic = self.residual == "isotropic" and r < d
        residual = missed / (d - r) if isotropic else torch.zeros_like(missed)
        return LowRankState(vectors, values, residual, steps + 1)


@dataclass(frozen=True)
class LowRankPlusDiagonalStructure(IteratedStructure):
    """See ``low_rank_plus_diagonal``."""

    rank: int
    fit: Fit = "alternating"
    iterations: int = 1
    method: Method = "subspace"
    weight: float = 1.0
    dense_up_to: int | None = None

    def init(self, dimension: int, like: Tensor) -> LowRankPlusDiagonalState:
        vectors = _start(dimension, min(self.rank, dimension), like)
        return LowRankPlusDiagonalState(
            vectors, vectors.new_zeros(vectors.shape[1]), vectors.new_zeros(dimension), no_steps(like)
        )

    def operator(self, state: LowRankPlusDiagonalState) -> LowRankPlusDiagonal:
        return state.operator(self.weight)

    def inverse(self, state: LowRankPlusDiagonalState, damping: float | Tensor) -> LowRankPlusDiagonal:
        return semidefinite_inverse(self.operator(state).shifted(damping))

    def size(self, dimension: int) -> int:
        r = min(self.rank, dimension)
        return 2 * (dimension * r + r + dimension)

    def description(self) -> str:
        return f"rank {self.rank} + diagonal"

    def _whole(self, covariance: Covariance) -> Tensor:
        return covariance.diagonal()

    def _previous(self, state: LowRankPlusDiagonalState, kept: Tensor) -> tuple[Average, Tensor, Tensor]:
        # The last diagonal as a share of the whole one: the factor's scale may have changed since.
        whole, weight, kept = state.diagonal + explained(state.vectors, state.values), 1 - kept, kept[..., None]
        new = Average(state.vectors, kept * state.values, kept * state.diagonal, weight)
        return new, kept * whole, _ratio(state.diagonal, whole)

    def _with_whole(self, carry: Turn, whole: Tensor) -> Turn:
        whole = carry.whole + carry.average.weight[..., None] * whole
        return carry._replace(whole=whole, less=self._subtracted(whole, whole * carry.less))

    def _subtracted(self, whole: Tensor, rest: Tensor) -> Tensor:
        return whole if self.fit == "off_diagonal" else rest

    def _rest(self, carry: Turn) -> Tensor:
        return carry.average.diagonal - carry.less

    def _after(self, carry: Turn, vectors: Tensor, values: Tensor, turn: int) -> Turn | LowRankPlusDiagonalState:
        values = values.clamp(min=0)
        whole, diagonal, steps = carry.whole, explained(vectors, values), carry.state.steps
        rest = (whole - diagonal).clamp(min=0)
        if turn < self.iterations:
            return carry._replace(rows=start_rows(vectors, steps + turn), less=self._subtracted(whole, rest))
        # Where the vectors explain more than the whole diagonal, rows are shortened: it is kept exactly.
        shortened = _ratio(whole, diagonal).clamp(max=1).sqrt()
        return LowRankPlusDiagonalState(shortened[..., None] * vectors, values, rest, steps + 1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return ``part / whole``, 0 where both are 0."""
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _start(dimension: int, rank: int, like: Tensor) -> Tensor:
    columns = pseudo_random(dimension, rank, no_steps(like) - 1)  # not the fresh columns of the first batch
    # Contiguous as every later basis, so that a compiled update is not compiled again for other strides.
    return orthonormal(columns.to(wide(like).dtype)).contiguous()


def low_rank(
    rank: int,
    residual: Residual = "isotropic",
    iterations: int = 1,
    method: Method = "subspace",
    weight: float = 1.0,
    dense_up_to: int | None = None,
) -> LowRankStructure:
    """Hold ``rank`` eigenpairs of a factor, and spread the trace that they miss evenly over all other directions.

    The running average is never formed: ``iterations`` steps per batch find its dominant eigenpairs from the last
    ones. The trace is kept exactly. A factor of dimension ``d ≤ rank + 2`` is held densely instead, which needs no more
    memory and is exact.

    Args:
        rank: Number of eigenpairs.
        residual: ``"isotropic"``, or ``"none"`` to drop what the eigenpairs miss, as the original low-rank K-FAC does.
            Then the damping alone acts on it, and a small damping makes the preconditioned step too long.
        iterations: Steps per batch; one is enough from a warm basis.
        method: ``"subspace"`` (all vectors at once), or ``"power"`` (one after another, by deflation), which is the
            original's method.
        weight: Factor of the residual in ``operator`` and inverse (not in the average itself). Above 1, the missed
            directions that matter most, those next to the kept ones, are damped enough.
        dense_up_to: Dimension up to which a factor is held densely, where that is more than ``rank + 2``. Up to about
            four times the rank that takes no longer, and four times as much memory.

    Returns:
        A factor structure for ``kronecker``.

    Raises:
        ValueError: If ``rank`` or ``iterations`` is below 1, ``weight`` is negative, or an option is unknown.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.structures import low_rank
        >>> tuple(low_rank(2).init(10, torch.zeros(())).vectors.shape)
        (10, 2)
    """
    check_integer(rank, "rank")
    check_choice(residual, "residual", get_args(Residual))
    _check_options(iterations, method, weight, dense_up_to)
    return LowRankStructure(rank, residual, iterations, method, float(weight), dense_up_to)


def low_rank_plus_diagonal(
    rank: int,
    fit: Fit = "alternating",
    iterations: int = 1,
    method: Method = "subspace",
    weight: float = 1.0,
    dense_up_to: int | None = None,
) -> LowRankPlusDiagonalStructure:
    """Hold ``rank`` eigenpairs and a diagonal that together keep the whole diagonal of the factor exactly.

    ``fit="alternating"`` is principal factor analysis: eigenpairs of ``B - diag(rest)`` and ``rest =
    diag(B) - diag(V Λ Vᵀ)`` take turns, one turn per iteration, starting from the last batch's.
    Negative eigenvalues are dropped and the rest is clipped at 0, so that the result is positive
    semi-definite. A factor of dimension ``d ≤ rank + 2`` is held densely instead.

    Args:
        rank: Number of eigenpairs.
        fit: ``"alternating"``, or ``"off_diagonal"``, which subtracts the whole diagonal before it looks for
            eigenpairs, as the original low-rank K-FAC does, but keeps only positive ones.
        iterations: Turns per batch; one is enough from a warm basis.
        method: ``"subspace"`` (all vectors at once), or ``"power"`` (one after another, by deflation), which is the
            original's method.
        weight: Factor of the diagonal in ``operator`` and inverse (not in the average itself).
        dense_up_to: Dimension up to which a factor is held densely, where that is more than ``rank + 2``.

    Returns:
        A factor structure for ``kronecker``.

    Raises:
        ValueError: If ``rank`` or ``iterations`` is below 1, ``weight`` is negative, or an option is unknown.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.structures import low_rank_plus_diagonal
        >>> tuple(low_rank_plus_diagonal(2).init(10, torch.zeros(())).diagonal.shape)
        (10,)
    """
    check_integer(rank, "rank")
    check_choice(fit, "fit", get_args(Fit))
    _check_options(iterations, method, weight, dense_up_to)
    return LowRankPlusDiagonalStructure(rank, fit, iterations, method, float(weight), dense_up_to)


def _check_options(iterations: int, method: Method, weight: float, dense_up_to: int | None) -> None:
    check_integer(iterations, "iterations")
    check_choice(method, "method", get_args(Method))
    if isinstance(weight, Tensor):  # it is part of the structure, which is compared and hashed
        raise TypeError("weight: expected a number, got a tensor")
    check_number(weight, "weight", 0)
    if dense_up_to is not None:
        check_integer(dense_up_to, "dense_up_to", 0)
