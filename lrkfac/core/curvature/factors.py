"""Dense and diagonal factors, and the running average that all structures share.

Every running average is bias-corrected: after ``t`` batches, batch ``s`` has the weight
``(1 - decay) decay^(t-s) / (1 - decay^t)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import most_precise, wide
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.curvature.spectra import Spectrum, spectrum_of
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.operators import Dense, Diagonal


class DenseState(NamedTuple):
    """``matrix`` ``[d, d]``; ``steps`` int64 ``[]``."""

    matrix: Tensor
    steps: Tensor

    def operator(self) -> Dense:
        return Dense(self.matrix)

    def spectrum(self) -> Spectrum:
        return spectrum_of(torch.linalg.eigvalsh(self.matrix), self.matrix.new_zeros(()))

    def inner(self, other: DenseState) -> Tensor:
        return (self.matrix * other.matrix).sum(dim=(-2, -1))

    def squared_distance(self, other: DenseState) -> Tensor:
        return (self.matrix - other.matrix).square().sum(dim=(-2, -1))


class Mixture(NamedTuple):
    """A state and the weight ``[*]`` that it keeps beside the batch."""

    state: Any
    kept: Tensor


@dataclass(frozen=True)
class DenseStructure(FactorStructure):
    """See ``dense``."""

    @property
    def stackable(self) -> bool:
        return True

    @property
    def rounds(self) -> int:
        return 1

    def init(self, dimension: int, like: Tensor) -> DenseState:
        return DenseState(wide(like).new_zeros(dimension, dimension), no_steps(like))

    def begin(self, state: DenseState, decay: float | Tensor) -> Mixture:
        return Mixture(state, kept_weight(state.steps, state.matrix, decay))

    def question(self, carry: Mixture, round: int) -> Tensor:
        return carry.kept

    def measure(self, question: Tensor, covariance: Covariance, round: int) -> Tensor:
        return covariance.dense()

    def advance(self, carry: Mixture, answers: Tensor, round: int) -> DenseState:
        state, kept = carry.state, carry.kept[..., None, None]
        return DenseState(kept * state.matrix + (1 - kept) * answers, state.steps + 1)

    def operator(self, state: DenseState) -> Dense:
        return state.operator()

    def size(self, dimension: int) -> int:
        return 2 * dimension * dimension

    def description(self) -> str:
        return "dense"


class DiagonalState(NamedTuple):
    """``diagonal`` ``[d]``; ``steps`` int64 ``[]``."""

    diagonal: Tensor
    steps: Tensor

    @property
    def fixed_basis(self) -> bool:
        return True

    def operator(self) -> Diagonal:
        return Diagonal(self.diagonal)

    def spectrum(self) -> Spectrum:
        return spectrum_of(self.diagonal, self.diagonal.new_zeros(()))

    def inner(self, other: DiagonalState) -> Tensor:
        return (self.diagonal * other.diagonal).sum(dim=-1)

    def squared_distance(self, other: DiagonalState) -> Tensor:
        return (self.diagonal - other.diagonal).square().sum(dim=-1)


@dataclass(frozen=True)
class DiagonalStructure(FactorStructure):
    """See ``diagonal``."""

    stands_alone: ClassVar[bool] = True

    @property
    def stackable(self) -> bool:
        return True

    @property
    def rounds(self) -> int:
        return 1

    def init(self, dimension: int, like: Tensor) -> DiagonalState:
        return DiagonalState(wide(like).new_zeros(dimension), no_steps(like))

    def begin(self, state: DiagonalState, decay: float | Tensor) -> Mixture:
        return Mixture(state, kept_weight(state.steps, state.diagonal, decay))

    def question(self, carry: Mixture, round: int) -> Tensor:
        return carry.kept

    def measure(self, question: Tensor, covariance: Covariance, round: int) -> Tensor:
        return covariance.diagonal()

    def advance(self, carry: Mixture, answers: Tensor, round: int) -> DiagonalState:
        state, kept = carry.state, carry.kept[..., None]
        return DiagonalState(kept * state.diagonal + (1 - kept) * answers, state.steps + 1)

    def operator(self, state: DiagonalState) -> Diagonal:
        return state.operator()

    def basis(self, state: DiagonalState) -> Tensor:
        return torch.eye(state.diagonal.shape[-1], dtype=state.diagonal.dtype, device=state.diagonal.device)

    def size(self, dimension: int) -> int:
        return 2 * dimension

    def description(self) -> str:
        return "diagonal"


def dense() -> DenseStructure:
    """Hold the whole factor, ``[d, d]``, as in plain K-FAC, in O(d²) memory and O(d³) time.

    Returns:
        A factor structure for ``kronecker``.

    Examples:
        >>> import torch
        >>> from lrkfac.structures import dense
        >>> tuple(dense().init(3, torch.zeros(())).matrix.shape)
        (3, 3)
    """
    return DenseStructure()


def diagonal() -> DiagonalStructure:
    """Hold only the diagonal of a factor, ``[d]``; outside of ``kronecker``, the diagonal of a layer's exact block.

    Returns:
        A factor structure for ``kronecker``, and a structure for ``precondition_by_fisher``.

    Examples:
        >>> import torch
        >>> from lrkfac.structures import diagonal
        >>> tuple(diagonal().init(3, torch.zeros(())).diagonal.shape)
        (3,)
    """
    return DiagonalStructure()


def kept_weight(steps: Tensor, like: Tensor, decay: float | Tensor) -> Tensor:
    """Return the weight of the previous, bias-corrected average in the next one; 0 at the first step."""
    accurate = (steps + 1).to(most_precise(like.device))  # of a decay near 1 little is left
    power = torch.pow(decay, accurate)
    return ((decay - power) / (1 - power)).to(like.dtype)


def no_steps(like: Tensor) -> Tensor:
    """Return a counter of batches at 0: int64, ``[]``."""
    return torch.zeros((), dtype=torch.int64, device=like.device)
