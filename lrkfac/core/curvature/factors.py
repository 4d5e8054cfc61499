"""How one factor is held, averaged over time and inverted.

A structure is a frozen description with pure functions ``init``, ``update``, ``operator`` and
``inverse``. It sees a factor only through a ``Covariance`` and never learns what layer it came from.
Every running average is bias-corrected: after ``t`` batches, batch ``s`` has the weight
``(1 - decay) decay^(t-s) / (1 - decay^t)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import wide
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.inverses import damped_inverse
from lrkfac.core.linalg.operators import Dense, Diagonal, Operator


class FactorStructure(Protocol):
    """What holds one factor."""

    def fitted(self, dimension: int) -> FactorStructure:
        """The structure to use for a ``[d, d]`` factor: itself, or one that is smaller and exact."""
        ...

    def init(self, dimension: int, like: Tensor) -> Any:
        """The state before the first batch, in the dtype (at least float32) and on the device of ``like``."""
        ...

    def update(self, state: Any, covariance: Covariance, decay: float | Tensor) -> Any:
        """The state after one more batch."""
        ...

    def operator(self, state: Any) -> Operator:
        """The running average, positive semi-definite."""
        ...

    def inverse(self, state: Any, damping: float | Tensor) -> Operator:
        """``(running average + damping I)⁻¹``, positive definite."""
        ...


class DenseState(NamedTuple):
    """``matrix`` ``[d, d]``; ``steps`` int64 ``[]``."""

    matrix: Tensor
    steps: Tensor


@dataclass(frozen=True)
class DenseStructure:
    """See ``dense``."""

    def fitted(self, dimension: int) -> DenseStructure:
        return self

    def init(self, dimension: int, like: Tensor) -> DenseState:
        return DenseState(wide(like).new_zeros(dimension, dimension), no_steps(like))

    def update(self, state: DenseState, covariance: Covariance, decay: float | Tensor) -> DenseState:
        kept = kept_weight(state.steps, state.matrix, decay)[..., None, None]
        return DenseState(kept * state.matrix + (1 - kept) * covariance.dense(), state.steps + 1)

    def operator(self, state: DenseState) -> Dense:
        return Dense(state.matrix)

    def inverse(self, state: DenseState, damping: float | Tensor) -> Operator:
        return damped_inverse(self.operator(state), damping)


class DiagonalState(NamedTuple):
    """``diagonal`` ``[d]``; ``steps`` int64 ``[]``."""

    diagonal: Tensor
    steps: Tensor


@dataclass(frozen=True)
class DiagonalStructure:
    """See ``diagonal``."""

    def fitted(self, dimension: int) -> DiagonalStructure:
        return self

    def init(self, dimension: int, like: Tensor) -> DiagonalState:
        return DiagonalState(wide(like).new_zeros(dimension), no_steps(like))

    def update(self, state: DiagonalState, covariance: Covariance, decay: float | Tensor) -> DiagonalState:
        kept = kept_weight(state.steps, state.diagonal, decay)[..., None]
        return DiagonalState(kept * state.diagonal + (1 - kept) * covariance.diagonal(), state.steps + 1)

    def operator(self, state: DiagonalState) -> Diagonal:
        return Diagonal(state.diagonal)

    def inverse(self, state: DiagonalState, damping: float | Tensor) -> Operator:
        return damped_inverse(self.operator(state), damping)


def dense() -> DenseStructure:
    """The whole factor, ``[d, d]``: what plain K-FAC holds, in O(d²) memory and O(d³) time."""
    return DenseStructure()


def diagonal() -> DiagonalStructure:
    """The factor's diagonal alone, ``[d]``."""
    return DiagonalStructure()


def kept_weight(steps: Tensor, like: Tensor, decay: float | Tensor) -> Tensor:
    """The weight of the previous, bias-corrected average in the next one; 0 at the first step."""
    accurate = like.dtype if like.device.type == "mps" else torch.float64  # of a decay near 1 little is left
    power = torch.pow(decay, (steps + 1).to(accurate))
    return ((decay - power) / (1 - power)).to(like.dtype)


def no_steps(like: Tensor) -> Tensor:
    """The number of batches at the start: int64, ``[]``."""
    return torch.zeros((), dtype=torch.int64, device=like.device)
