"""Factors represented by a few eigenpairs, which start from the last ones; no ``d × d`` matrix is formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_choice, check_integer, check_number
from lrkfac.core.base.dtypes import wide
from lrkfac.core.curvature.factors import dense, kept_weight, no_steps
from lrkfac.core.curvature.low_rank_states import LowRankPlusDiagonalState, LowRankState
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.linalg.averages import Average, average, explained
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.eigen import orthonormal, power_iteration, pseudo_random, ritz
from lrkfac.core.linalg.operators import LowRankPlusDiagonal

Residual = Literal["isotropic", "none"]


Fit = Literal["alternating", "off_diagonal"]


Method = Literal["subspace", "power"]


OVERSAMPLING = 4
"""Fresh start columns per update, so that a warm basis does not miss a new direction."""


@dataclass(frozen=True)
class LowRankStructure(FactorStructure):
    """See ``low_rank``."""

    rank: int
    residual: Residual = "isotropic"
    iterations: int = 1
    method: Method = "subspace"
    weight: float = 1.0

    @property
    def stackable(self) -> bool:
        return self.method == "subspace"

    def fitted(self, dimension: int) -> FactorStructure:
        return dense() if dimension <= self.rank + 2 else self

    def init(self, dimension: int, like: Tensor) -> LowRankState:
        vectors = _start(dimension, min(self.rank, dimension), like)
        return LowRankState(vectors, vectors.new_zeros(vectors.shape[1]), vectors.new_zeros(()), no_steps(like))

    def update(self, state: LowRankState, covariance: Covariance, decay: float | Tensor) -> LowRankState:
        d, r = state.vectors.shape[-2:]
        kept = kept_weight(state.steps, state.vectors, decay)
        new = average(kept, state.operator(), covariance)
        vectors, nothing = state.vectors, torch.zeros_like(new.previous.diagonal[..., :1])
        for i in range(self.iterations):
            vectors, values = _largest(self.method, new, nothing, vectors, state.steps + i)
        missed = (new.trace() - values.sum(dim=-1)).clamp(min=0)
        isotropic = self.residual == "isotropic" and r < d
        residual = missed / (d - r) if isotropic else torch.zeros_like(missed)
        return LowRankState(vectors, values, residual, state.steps + 1)

    def operator(self, state: LowRankState) -> LowRankPlusDiagonal:
        return state.operator(self.weight)

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

    def basis(self, state: LowRankState) -> Tensor:
        return orthonormal(state.vectors).contiguous()

    def size(self, dimension: int) -> int:
        r = min(self.rank, dimension)
        return 2 * (dimension * r + r) + 1 + dimension

    def description(self) -> str:
        return f"rank {self.rank}"


@dataclass(frozen=True)
class LowRankPlusDiagonalStructure(FactorStructure):
    """See ``low_rank_plus_diagonal``."""

    rank: int
    fit: Fit = "alternating"
    iterations: int = 1
    method: Method = "subspace"
    weight: float = 1.0

    @property
    def stackable(self) -> bool:
        return self.method == "subspace"

    def fitted(self, dimension: int) -> FactorStructure:
        return dense() if dimension <= self.rank + 2 else self

    def init(self, dimension: int, like: Tensor) -> LowRankPlusDiagonalState:
        vectors = _start(dimension, min(self.rank, dimension), like)
        return LowRankPlusDiagonalState(
            vectors, vectors.new_zeros(vectors.shape[1]), vectors.new_zeros(dimension), no_steps(like)
        )

    def update(
        self, state: LowRankPlusDiagonalState, covariance: Covariance, decay: float | Tensor
    ) -> LowRankPlusDiagonalState:
        kept = kept_weight(state.steps, state.vectors, decay)
        new = average(kept, state.operator(), covariance)
        whole = new.diagonal()
        vectors, rest = state.vectors, state.diagonal
        # The last diagonal as a share of the whole one: the factor's scale may have changed since.
        rest = whole * _ratio(rest, rest + explained(vectors, state.values))
        for i in range(self.iterations):
            subtracted = whole if self.fit == "off_diagonal" else rest
            vectors, values = _largest(self.method, new, subtracted, vectors, state.steps + i)
            diagonal = explained(vectors, values)
            rest = (whole - diagonal).clamp(min=0)
        # Where the vectors explain more than the whole diagonal, rows are shortened: it is kept exactly.
        shortened = _ratio(whole, diagonal).clamp(max=1).sqrt()
        return LowRankPlusDiagonalState(shortened[..., None] * vectors, values, rest, state.steps + 1)

    def operator(self, state: LowRankPlusDiagonalState) -> LowRankPlusDiagonal:
        return state.operator(self.weight)

    def basis(self, state: LowRankPlusDiagonalState) -> Tensor:
        return orthonormal(state.vectors).contiguous()

    def size(self, dimension: int) -> int:
        r = min(self.rank, dimension)
        return 2 * (dimension * r + r + dimension)

    def description(self) -> str:
        return f"rank {self.rank} + diagonal"


def _largest(method: Method, new: Average, less: Tensor, vectors: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenpairs of ``new - diag(less)`` after one step towards those of largest value.

    Negative values, which a positive semi-definite operator cannot have, become 0.
    """
    d, r = vectors.shape[-2:]
    fresh = pseudo_random(d, min(OVERSAMPLING, d - r), seed).to(vectors.dtype)
    if method == "power":
        start = torch.cat([vectors, fresh], dim=-1)
        vectors, values = power_iteration(lambda v: new.of_rows(v.mT, less).mT, start, max_iterations=1)
        order = values.argsort(descending=True)[:r]
        return vectors[:, order], values[order].clamp(min=0)
    # Rows, as which they lie in memory for products and QR alike.
    start = torch.cat([vectors.mT, fresh.mT], dim=-2)
    basis = orthonormal(new.of_rows(start, less).mT)
    values, rotation = ritz(new.between(basis.mT, less))
    return basis @ rotation[..., -r:].flip(-1), values[..., -r:].flip(-1).clamp(min=0)


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
    _check_options(iterations, method, weight)
    return LowRankStructure(rank, residual, iterations, method, float(weight))


def low_rank_plus_diagonal(
    rank: int,
    fit: Fit = "alternating",
    iterations: int = 1,
    method: Method = "subspace",
    weight: float = 1.0,
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
    _check_options(iterations, method, weight)
    return LowRankPlusDiagonalStructure(rank, fit, iterations, method, float(weight))


def _check_options(iterations: int, method: Method, weight: float) -> None:
    check_integer(iterations, "iterations")
    check_choice(method, "method", get_args(Method))
    if isinstance(weight, Tensor):  # it is part of the structure, which is compared and hashed
        raise TypeError("weight: expected a number, got a tensor")
    check_number(weight, "weight", 0)
