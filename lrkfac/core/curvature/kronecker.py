"""A layer's Fisher block as a Kronecker product of two factors, each with its own structure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature.covariances import partial_trace_weights
from lrkfac.core.curvature.factors import diagonal
from lrkfac.core.curvature.joining import STACKED, Joining
from lrkfac.core.curvature.protocol import BlockStatistics, BlockStructure, FactorStructure
from lrkfac.core.curvature.spectra import SIDES, WHOLE, Damped, Part, Spectrum, spectrum_of
from lrkfac.core.layers.description import Layer, Treatment
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.linalg.covariances import Covariance, KroneckerFactors
from lrkfac.core.linalg.damping import ExactInverse
from lrkfac.core.linalg.eigen import ritz_of_all
from lrkfac.core.linalg.operators import Kronecker, split_by_means
from lrkfac.core.linalg.powers import KroneckerPower
from lrkfac.core.linalg.products import of_rows, two_sided


class KroneckerState(NamedTuple):
    """The states of the output factor ``B`` and of the input factor ``A``."""

    output: Any
    input: Any

    @property
    def is_product(self) -> bool:
        return True

    def factor_states(self) -> tuple[Any, ...]:
        return (self.output, self.input)

    @property
    def steps(self) -> Tensor:
        """The number of batches in both."""
        steps: Tensor = self.input.steps
        return steps

    def parts(self, inverse: Any, dampings: Tensor) -> list[Part]:
        if isinstance(inverse, Kronecker):
            return [Part(side, self[i], inverse[i], dampings[..., i]) for i, side in enumerate(SIDES)]
        if isinstance(inverse, KroneckerPower):  # which is no inverse of the damped factors
            return [Part(side, self[i], (), dampings[..., i]) for i, side in enumerate(SIDES)]
        sides = [Part(side, self[i]) for i, side in enumerate(SIDES)]
        return [*sides, Part(WHOLE, self, inverse, dampings)]  # damped as a whole

    def spectrum(self) -> Spectrum:
        (b, rest_b), (a, rest_a) = (side.spectrum() for side in self)
        left_out = b.sum() * rest_a + rest_b * a.sum() + rest_b * rest_a
        return spectrum_of((b[:, None] * a).reshape(-1), left_out)

    def damped(self, inverse: ExactInverse, damping: Tensor, eigenvalues: Tensor) -> Damped:
        effective = inverse.dimension - damping * inverse.trace()
        b, a = (side.largest() if hasattr(side, "largest") else side.spectrum()[0].amax() for side in self)
        return Damped(effective, b * a + damping, 1 / inverse.largest())


class PartAnswers(NamedTuple):
    """Answers of ``B`` and ``A`` in a round, for each way to use the weight, and with several the traces of both."""

    parts: tuple[tuple[Any, ...], ...]
    traces: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class KroneckerStructure(BlockStructure):
    """See ``kronecker``."""

    input: FactorStructure
    output: FactorStructure
    treatment: Treatment = "expand"

    is_product: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = True

    @property
    def needs_examples(self) -> bool:
        return self.treatment == "reduce"

    @property
    def mappable(self) -> bool:
        return True

    @property
    def stackable(self) -> bool:
        return self.treatment == "expand" and self.input.stackable and self.output.stackable

    @property
    def joining(self) -> Joining:
        return STACKED

    def for_layer(self, layer: Layer) -> KroneckerStructure:
        # The one-hot side of an embedding is diagonal: with treatment="expand", exactly.
        structure = replace(self, output=diagonal()) if layer.kind == "embedding" else self
        return structure.fitted(layer.d_in, layer.d_out)

    def fitted(self, d_in: int, d_out: int) -> KroneckerStructure:
        """Return the structure to use for a layer of this size: each factor may prefer a smaller, exact one."""
        return KroneckerStructure(self.input.fitted(d_in), self.output.fitted(d_out), self.treatment)

    def init(self, d_in: int, d_out: int, like: Tensor) -> KroneckerState:
        return KroneckerState(self.output.init(d_out, like), self.input.init(d_in, like))

    def update_from(self, state: KroneckerState, statistics: BlockStatistics, decay: float | Tensor) -> KroneckerState:
        return self.update(state, *statistics.kronecker_factors(self.treatment), decay)

    def update(
        self,
        state: KroneckerState,
        output: Covariance,
        input: Covariance,
        decay: float | Tensor,
    ) -> KroneckerState:
        """Return the state after one more batch with these factors."""
        return KroneckerState(
            self.output.update(state.output, output, decay), self.input.update(state.input, input, decay)
        )

    @property
    def rounds(self) -> int:
        """Both factors ask in the same rounds; 0 where one of them knows no rounds."""
        both = self.output.rounds, self.input.rounds
        return max(both) if all(both) else 0

    def begin(self, state: KroneckerState, decay: float | Tensor) -> KroneckerState:
        return KroneckerState(self.output.begin(state.output, decay), self.input.begin(state.input, decay))

    def question(self, carry: KroneckerState, round: int) -> KroneckerState:
        sides = zip((self.output, self.input), carry, strict=True)
        return KroneckerState(*[side.question(one, round) if round < side.rounds else () for side, one in sides])

    def measure(self, question: KroneckerState, statistics: BlockStatistics, round: int) -> PartAnswers:
        parts = statistics.kronecker_parts(self.treatment)
        # The weights of several parts are not linear in them: their traces are summed beside what is weighted.
        traces = [(part.output.trace(), part.input.trace()) for part in parts] if len(parts) > 1 else []
        return PartAnswers(tuple([self._answers(question, part, round) for part in parts]), tuple(traces))

    def takes_eigenpairs(self, round: int) -> bool:
        return any(side.takes_eigenpairs(round) for side in (self.output, self.input))

    def eigenproblem(self, carry: KroneckerState, answers: PartAnswers, round: int) -> tuple[Any, ...]:
        """Return the matrix of ``B`` and that of ``A``, or ``()`` for a side that takes no eigenpairs."""
        sides = zip((self.output, self.input), carry, _summed(answers), strict=True)
        return tuple([x.eigenproblem(one, y, round) if x.takes_eigenpairs(round) else () for x, one, y in sides])

    def advance(self, carry: KroneckerState, answers: PartAnswers, round: int, solved: Any = None) -> KroneckerState:
        if solved is None and self.takes_eigenpairs(round):
            solved = ritz_of_all(self.eigenproblem(carry, answers, round))
        sides = zip((self.output, self.input), carry, _summed(answers), solved or ((), ()), strict=True)
        return KroneckerState(*[_advanced(side, one, x, pairs, round) for side, one, x, pairs in sides])

    def _answers(self, question: KroneckerState, part: KroneckerFactors, round: int) -> tuple[Any, ...]:
        sides = zip((self.output, self.input), question, part, strict=True)
        return tuple([side.measure(one, x, round) if round < side.rounds else () for side, one, x in sides])

    def operator(self, state: KroneckerState) -> Kronecker:
        """Return the running average, ``B ⊗ A``."""
        return Kronecker(self.output.operator(state.output), self.input.operator(state.input))

    def damped_inverse(self, state: KroneckerState, damping: float | Tensor) -> tuple[Any, Tensor]:
        """Return ``(B + δ_B I)⁻¹ ⊗ (A + δ_A I)⁻¹`` with ``δ_A δ_B = damping``, and ``δ_B, δ_A``, ``[*, 2]``.

        The damping is split as in ``Kronecker.shifted``.
        """
        of_output, of_input = self._mean_eigenvalues(state)
        on_input, on_output = split_by_means(of_input, of_output, damping)
        inverse = Kronecker(self.output.inverse(state.output, on_output), self.input.inverse(state.input, on_input))
        return inverse, torch.stack([on_output, on_input], dim=-1).to(of_output.dtype)

    def mean_eigenvalue(self, state: KroneckerState) -> Tensor:
        of_output, of_input = self._mean_eigenvalues(state)
        return of_output * of_input

    def _mean_eigenvalues(self, state: KroneckerState) -> list[Tensor]:
        sides = zip((self.output, self.input), state, strict=True)
        return [side.mean_eigenvalue(one) for side, one in sides]

    def apply(self, inverse: Any, gradient: LayerMatrix) -> LayerMatrix:
        weight, bias = gradient
        if not isinstance(weight, LazyMatrix):
            return LayerMatrix(*two_sided(inverse, weight, bias))
        output = inverse.output
        if bias is None:
            left, right = output.of_rows(weight.left), inverse.input.of_rows(weight.right)
            return LayerMatrix(LazyMatrix(left, right, weight.dtype))
        # The bias is one more row: it need not be the sum of the others, which may have been scaled since.
        left = output.of_rows(torch.cat([weight.left, bias[..., None, :]], dim=-2))
        rows = F.pad(weight.right, (0, 0, 0, 1))
        column = F.pad(torch.zeros_like(weight.right[..., 0]), (0, 1), value=1.0)
        right, ones = of_rows(inverse.input, rows, column)
        assert ones is not None
        return LayerMatrix(LazyMatrix(left, right, weight.dtype), (ones[..., None, :] @ left).squeeze(-2))

    def size(self, d_in: int, d_out: int) -> int | None:
        return self.input.size(d_in) + self.output.size(d_out) + 2

    def description(self) -> str:
        return f"A {self.input.description()}, B {self.output.description()}"


def _summed(answers: PartAnswers) -> tuple[Any, ...]:
    """Return the answers of ``B`` and ``A``, of all ways to use the weight together."""
    if not answers.traces:
        return answers.parts[0]
    weights = zip(*partial_trace_weights(answers.traces), strict=True)
    parts = zip(*answers.parts, strict=True)
    return tuple([_weighted(*side) for side in zip(parts, weights, strict=True)])


def _advanced(side: Any, carry: Any, answers: Any, solved: Any, round: int) -> Any:
    """Return what a side's next round starts from; one that has no more rounds stays."""
    if round >= side.rounds:
        return carry
    return side.advance(carry, answers, round, solved) if solved else side.advance(carry, answers, round)


def _weighted(parts: tuple[Any, ...], weights: tuple[Tensor, ...]) -> Any:
    """Return ``Σ weights[k] * parts[k]`` of trees."""
    return optree.tree_map(
        lambda *x: torch.stack([w * one for w, one in zip(weights, x, strict=True)]).sum(dim=0), *parts
    )
