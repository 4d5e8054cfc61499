"""Eigenpairs of a running average by steps of subspace iteration from the last ones, in rounds of questions."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.curvature.factors import dense, kept_weight
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.linalg.averages import Average
from lrkfac.core.linalg.bases import orthonormal, pseudo_random
from lrkfac.core.linalg.covariances import Covariance, between, of_rows
from lrkfac.core.linalg.eigen import Eigenpairs, power_iteration, ritz

Method = Literal["subspace", "power"]


OVERSAMPLING = 4
"""Fresh start columns per update, so that a warm basis does not miss a new direction."""


class Turn(NamedTuple):
    """Where an update is between two rounds; several may be stacked.

    Attributes:
        state: The last state.
        average: The new average, which is never formed.
        whole: Trace ``[*]`` or diagonal ``[*, d]`` of the new average; of its previous part alone, before the first
            answers.
        less: What is subtracted from the diagonal before eigenpairs are looked for, ``[*, d]`` or ``[*, 1]``; before
            the first answers, as a share of the whole.
        rows: Start of the next step, ``[*, k, d]``, or the orthonormal basis that it has led to.
    """

    state: Any
    average: Average
    whole: Tensor
    less: Tensor
    rows: Tensor


class IteratedStructure(FactorStructure):
    """Steps from the last eigenpairs towards those of the new average: two rounds for each step.

    The first asks for the covariance along the start, the second for its projection to the basis that follows.
    """

    rank: int
    iterations: int
    method: Method
    dense_up_to: int | None

    @property
    def stackable(self) -> bool:
        return self.method == "subspace"

    @property
    def rounds(self) -> int:
        return 2 * self.iterations if self.method == "subspace" else 0

    def fitted(self, dimension: int) -> FactorStructure:
        return dense() if dimension <= max(self.rank + 2, self.dense_up_to or 0) else self

    def begin(self, state: Any, decay: float | Tensor) -> Turn:
        kept = kept_weight(state.steps, state.vectors, decay)
        return Turn(state, *self._previous(state, kept), start_rows(state.vectors, state.steps))

    def question(self, carry: Turn, round: int) -> Tensor:
        return carry.rows

    def measure(self, question: Tensor, covariance: Covariance, round: int) -> Any:
        if round % 2:
            return between(covariance, question)
        along = of_rows(covariance, question)
        return along if round else (along, self._whole(covariance))

    def takes_eigenpairs(self, round: int) -> bool:
        return round % 2 == 1 and round < self.rounds

    def eigenproblem(self, carry: Turn, answers: Tensor, round: int) -> Tensor:
        return carry.average.between(carry.rows, answers, self._rest(carry))

    def advance(self, carry: Turn, answers: Any, round: int, solved: Eigenpairs | None = None) -> Any:
        rows, new = carry.rows, carry.average
        if round % 2:
            values, rotation = solved or ritz(self.eigenproblem(carry, answers, round))
            r = carry.state.values.shape[-1]
            vectors = rows.mT @ rotation[..., -r:].flip(-1)
            return self._after(carry, vectors, values[..., -r:].flip(-1), (round + 1) // 2)
        if not round:
            answers, whole = answers
            carry = self._with_whole(carry, whole)
        return carry._replace(rows=orthonormal(new.of_rows(rows, answers, self._rest(carry)).mT).mT)

    def update(self, state: Any, covariance: Covariance, decay: float | Tensor) -> Any:
        if self.method == "subspace":
            return super().update(state, covariance, decay)
        carry = self._with_whole(self.begin(state, decay), self._whole(covariance))
        for turn in range(1, self.iterations + 1):
            rows, new, rest = carry.rows, carry.average, self._rest(carry)

            def product(x: Tensor, new: Average = new, rest: Tensor | None = rest) -> Tensor:
                return new.of_rows(x.mT, of_rows(covariance, x.mT), rest).mT

            vectors, values = power_iteration(product, rows.mT, max_iterations=1)
            order = values.argsort(descending=True)[: state.values.shape[-1]]
            carry = self._after(carry, vectors[:, order], values[order], turn)
        return carry

    def basis(self, state: Any) -> Tensor:
        return orthonormal(state.vectors).contiguous()

    @abstractmethod
    def _whole(self, covariance: Covariance) -> Tensor:
        """Return the trace or the diagonal."""

    @abstractmethod
    def _previous(self, state: Any, kept: Tensor) -> tuple[Average, Tensor, Tensor]:
        """Return the average, the whole of its previous part, and the share of it that is subtracted."""

    @abstractmethod
    def _with_whole(self, carry: Turn, whole: Tensor) -> Turn:
        """Return the carry with the whole of the new average, from that of the covariance."""

    @abstractmethod
    def _rest(self, carry: Turn) -> Tensor | None:
        """Return what is left of the average's diagonal, ``[*, d]``; ``None`` for nothing."""

    @abstractmethod
    def _after(self, carry: Turn, vectors: Tensor, values: Tensor, turn: int) -> Any:
        """Return the start of the next step from new eigenpairs, or the state where there is none.

        They are those of what is left after the subtraction. Negative values, which a positive semi-definite operator
        cannot have, become 0.
        """


def start_rows(vectors: Tensor, seed: Tensor) -> Tensor:
    """Return the last vectors and fresh ones as rows, as which they lie in memory for products and QR alike."""
    d, r = vectors.shape[-2:]
    fresh = pseudo_random(d, min(OVERSAMPLING, d - r), seed).to(vectors.dtype)
    return torch.cat([vectors.mT, fresh.mT], dim=-2)
