"""What an average and its damped inverse tell: eigenvalues, what eigenpairs hold of the trace, effective dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.curvature.ekfac import CorrectedState
from lrkfac.core.curvature.factors import DenseState, DiagonalState
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalState, LowRankState
from lrkfac.core.linalg.operators import LowRankPlusDiagonal


class Spectrum(NamedTuple):
    """Of a matrix ``M``: the eigenvalues of the eigenpairs that are held, ``[r]``, largest first (of a matrix that is
    held whole, all), and the trace that they leave out, ``[]``.
    """

    eigenvalues: Tensor
    rest: Tensor


class Damped(NamedTuple):
    """Of ``M`` with its damping ``δ``: ``tr(M (M + δ I)⁻¹)``, and bounds of the eigenvalues of ``M + δ I``, as it was
    inverted; ``[]`` each. The bounds are eigenvalues, but with ``low_rank_plus_diagonal``.
    """

    effective: Tensor
    largest: Tensor
    smallest: Tensor


def spectrum(state: Any) -> Spectrum:
    """Of the average that a factor's or an exact block's state holds.

    Raises:
        TypeError: If the state is of no structure of the package.
    """
    if isinstance(state, LowRankState):
        d, r = state.vectors.shape
        return _spectrum(state.values, (d - r) * state.residual)
    if isinstance(state, LowRankPlusDiagonalState):
        return _spectrum(state.values * state.vectors.square().sum(dim=0), state.diagonal.sum())
    if isinstance(state, CorrectedState):
        kept = state.average.kept
        return _spectrum(kept.reshape(-1), state.average.trace() - kept.sum())
    if isinstance(state, DenseState):
        return _spectrum(torch.linalg.eigvalsh(state.matrix), state.matrix.new_zeros(()))
    if isinstance(state, DiagonalState):
        return _spectrum(state.diagonal, state.diagonal.new_zeros(()))
    raise TypeError(f"state: expected that of a structure of lrkfac, got {type(state).__name__}, which has no spectrum")


def _spectrum(values: Tensor, rest: Tensor) -> Spectrum:
    return Spectrum(values.clamp(min=0).sort(descending=True).values, rest.clamp(min=0))


def damped(state: Any, inverse: Any, damping: Tensor, eigenvalues: Tensor) -> Damped:
    """Of a state of ``spectrum``, its inverse, damping ``[]`` and eigenvalues."""
    if isinstance(state, LowRankState):
        (d, r), around = state.vectors.shape, 1 / inverse.diagonal[0]  # the residual by its weight, and the damping
        groups = [(eigenvalues, eigenvalues + damping, 1)]
        groups += [(state.residual[None], around[None], d - r)] if r < d else []
        return _damped(groups)
    if isinstance(state, LowRankPlusDiagonalState):
        return _damped_with_diagonal(state, 1 / inverse.diagonal)
    if isinstance(state, CorrectedState):
        average = state.average
        (d_out, r_out), (d_in, r_in) = average.output_vectors.shape, average.input_vectors.shape
        more_out, more_in = d_out - r_out, d_in - r_in
        often = {"kept": 1, "output": more_in, "input": more_out, "rest": more_in * more_out}
        parts = [(getattr(average, name).reshape(-1), times) for name, times in often.items() if times]
        return _damped([(values, values + damping, times) for values, times in parts])
    return _damped([(eigenvalues, eigenvalues + damping, 1)])


def _damped(groups: list[tuple[Tensor, Tensor, int]]) -> Damped:
    """From eigenvalues, the same damped, and how often they occur."""
    effective = torch.stack([(values / shifted).sum() * often for values, shifted, often in groups]).sum()
    every = torch.cat([shifted for _, shifted, _ in groups])
    return Damped(effective, every.amax(), every.amin())


def _damped_with_diagonal(state: LowRankPlusDiagonalState, around: Tensor) -> Damped:
    # With M = V Λ Vᵀ + D, and E in place of D in what was inverted, tr(M (V Λ Vᵀ + E)⁻¹) = Σ D/E + Σ (1 - D/E) h, where
    # h is the diagonal of U (I + UᵀU)⁻¹ Uᵀ and U = E^{-1/2} V Λ^{1/2}: sums without cancellation.
    scaled = around.rsqrt()[:, None] * state.vectors * state.values.clamp(min=0).sqrt()
    mu, rotation = torch.linalg.eigh(scaled.mT @ scaled)
    held = (scaled @ rotation).square() @ (1 / (1 + mu.clamp(min=0)))
    known = state.diagonal / around
    pairs = state.values.clamp(min=0).sqrt() * state.vectors
    largest = torch.linalg.eigvalsh(pairs.mT @ pairs).amax() + around.amax()  # at most twice the largest eigenvalue
    return Damped((known + (1 - known) * held).sum(), largest, around.amin())


def squared_distance(state: Any, other: Any) -> tuple[Tensor, Tensor]:
    """``‖M - N‖²`` and ``‖M‖²`` in Frobenius norm, ``[]`` each, of the averages that two states of one form hold."""
    if isinstance(state, DenseState):
        return (state.matrix - other.matrix).square().sum(), state.matrix.square().sum()
    if isinstance(state, DiagonalState):
        return (state.diagonal - other.diagonal).square().sum(), state.diagonal.square().sum()
    one, two = thin(state), thin(other)
    difference = LowRankPlusDiagonal(
        torch.cat([one.vectors, two.vectors], dim=1),
        torch.cat([one.values, -two.values]),
        one.diagonal - two.diagonal,
    )
    return inner(difference, difference).clamp(min=0), inner(one, one)


def thin(state: LowRankState | LowRankPlusDiagonalState) -> LowRankPlusDiagonal:
    """The average that eigenpairs and a rest hold; leading axes are those of groups and units."""
    if isinstance(state, LowRankPlusDiagonalState):
        return LowRankPlusDiagonal(state.vectors, state.values, state.diagonal)
    rest = state.residual[..., None]
    around = rest.expand(*rest.shape[:-1], state.vectors.shape[-2])
    return LowRankPlusDiagonal(state.vectors, state.values - rest, around)


def inner(one: LowRankPlusDiagonal, two: LowRankPlusDiagonal) -> Tensor:
    """``tr(M N)``, over the last axes."""
    (u, s, d), (v, t, e) = one, two
    products = (u.mT @ v).square()
    pairs = (s * (products @ t[..., None])[..., 0]).sum(dim=-1) + (d * e).sum(dim=-1)
    at_two = ((u.square() @ s[..., None])[..., 0] * e).sum(dim=-1)
    at_one = ((v.square() @ t[..., None])[..., 0] * d).sum(dim=-1)
    return pairs + at_two + at_one
