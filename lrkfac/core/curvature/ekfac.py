"""EKFAC: a layer's Fisher block by its diagonal in the eigenbasis of a Kronecker product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.curvature.factors import kept_weight, no_steps
from lrkfac.core.curvature.kronecker import KroneckerState, KroneckerStructure
from lrkfac.core.curvature.protocol import BlockStatistics, BlockStructure
from lrkfac.core.curvature.spectra import SIDES, WHOLE, Damped, Part, Spectrum, damped_of, spectrum_of
from lrkfac.core.layers.description import Layer
from lrkfac.core.layers.kinds import KINDS
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.inverses import damped_inverse
from lrkfac.core.linalg.moments import Moments, RandomMatrix


class EigenbasisState(NamedTuple):
    """``factors``, which give the basis; ``average``, the block in it; ``steps`` int64 ``[]``."""

    factors: KroneckerState
    average: EigenbasisKronecker
    steps: Tensor

    @property
    def is_product(self) -> bool:
        return True

    def factor_states(self) -> tuple[Any, ...]:
        return self.factors.factor_states()

    def parts(self, inverse: EigenbasisKronecker, dampings: Tensor) -> list[Part]:
        sides = [Part(side, self.factors[i]) for i, side in enumerate(SIDES)]
        return [*sides, Part(WHOLE, self, inverse, dampings)]

    def spectrum(self) -> Spectrum:
        kept = self.average.kept
        return spectrum_of(kept.reshape(-1), self.average.trace() - kept.sum())

    def damped(self, inverse: EigenbasisKronecker, damping: Tensor, eigenvalues: Tensor) -> Damped:
        (d_out, r_out), (d_in, r_in) = self.average.output_vectors.shape, self.average.input_vectors.shape
        more_out, more_in = d_out - r_out, d_in - r_in
        often = {"kept": 1, "output": more_in, "input": more_out, "rest": more_in * more_out}
        groups = [(getattr(self.average, name).reshape(-1), times) for name, times in often.items() if times]
        return damped_of([(values, values + damping, times) for values, times in groups])


class Turning(NamedTuple):
    """An update while its factors are updated: what these have reached; average and steps of the last state, and the
    weight that it keeps.
    """

    factors: KroneckerState
    average: EigenbasisKronecker
    steps: Tensor
    kept: Tensor


class Turned(NamedTuple):
    """The same with the new factors, and their bases."""

    factors: KroneckerState
    average: EigenbasisKronecker
    steps: Tensor
    kept: Tensor
    output_vectors: Tensor
    input_vectors: Tensor


class Bases(NamedTuple):
    """The bases along which the last round asks for moments."""

    output_vectors: Tensor
    input_vectors: Tensor


@dataclass(frozen=True)
class EigenbasisStructure(BlockStructure):
    """The diagonal of the block in the basis of the factors: EKFAC (George et al. 2018, arXiv 1806.03884).

    With orthonormal bases ``u_i`` of the output factor and ``v_j`` of the input factor (all eigenvectors of a
    dense one, unit vectors of a diagonal one, the ``r`` kept directions else), the eigenvalue of ``u_i v_jᵀ`` is
    ``E (u_iᵀ G_n v_j)²`` over examples' gradients ``G_n``, not a product of two eigenvalues. The rest of the second
    moment is spread evenly: of each ``u_i`` over the other directions of the input, of each ``v_j`` over those of the
    output, and the remainder over all that neither basis spans. The diagonal of ``low_rank_plus_diagonal`` helps to
    find its directions and ends there: it has no part in a common eigenbasis, in which every eigenvalue is positive and
    plainly damped. Plain damping lacks the cross terms ``δ_B A + δ_A B`` of the damping that is split between factors:
    the same number damps less.

    When the bases turn, the running average is carried over (``EigenbasisKronecker.moments``). The trace, ``E ‖G_n‖²``,
    is kept exactly. Where a factor has equal eigenvalues (a dense one of fewer rows than columns) its basis is
    arbitrary among them, and so are the eigenvalues measured there.

    Attributes:
        factors: The product that gives the basis.
    """

    factors: KroneckerStructure

    is_product: ClassVar[bool] = True
    form: ClassVar[str] = "a corrected"

    def for_layer(self, layer: Layer) -> BlockStructure:
        # A basis of the one-hot side of an embedding would be a square of the vocabulary.
        one_hot = any(KINDS[kind].one_hot for kind in layer.kinds)
        return self.factors.for_layer(layer) if one_hot else super().for_layer(layer)

    def fitted(self, d_in: int, d_out: int) -> EigenbasisStructure:
        return EigenbasisStructure(self.factors.fitted(d_in, d_out))

    def init(self, d_in: int, d_out: int, like: Tensor) -> EigenbasisState:
        factors = self.factors.init(d_in, d_out, like)
        u, v = self._bases(factors)
        r_out, r_in = u.shape[1], v.shape[1]
        nothing = Moments(u.new_zeros(r_out, r_in), u.new_zeros(r_out), v.new_zeros(r_in), u.new_zeros(()))
        return EigenbasisState(factors, from_moments(u, v, nothing), no_steps(like))

    def update_from(
        self, state: EigenbasisState, statistics: BlockStatistics, decay: float | Tensor
    ) -> EigenbasisState:
        factors = statistics.kronecker_factors(self.factors.treatment)
        return self.update(state, *factors, statistics, decay)

    def update(
        self,
        state: EigenbasisState,
        output: Covariance,
        input: Covariance,
        gradients: RandomMatrix,
        decay: float | Tensor,
    ) -> EigenbasisState:
        """Return the state after one more batch with these factors and examples' gradients."""
        factors = self.factors.update(state.factors, output, input, decay)
        kept = kept_weight(state.steps, state.average.rest, decay)
        turned = Turned(factors, state.average, state.steps, kept, *self._bases(factors))
        return _corrected(turned, gradients.moments(turned.output_vectors, turned.input_vectors))

    @property
    def rounds(self) -> int:
        """The last round asks for the moments along the bases of the new factors."""
        return self.factors.rounds + 1 if self.factors.rounds else 0

    def begin(self, state: EigenbasisState, decay: float | Tensor) -> Turning:
        kept = kept_weight(state.steps, state.average.rest, decay)
        return Turning(self.factors.begin(state.factors, decay), state.average, state.steps, kept)

    def question(self, carry: Turning | Turned, round: int) -> KroneckerState | Bases:
        if isinstance(carry, Turned):
            return Bases(carry.output_vectors, carry.input_vectors)
        return self.factors.question(carry.factors, round)

    def measure(self, question: KroneckerState | Bases, statistics: BlockStatistics, round: int) -> Any:
        if isinstance(question, Bases):
            return statistics.moments(*question)
        return self.factors.measure(question, statistics, round)

    def advance(self, carry: Turning | Turned, answers: Any, round: int) -> Turning | Turned | EigenbasisState:
        if isinstance(carry, Turned):
            return _corrected(carry, answers)
        factors = self.factors.advance(carry.factors, answers, round)
        if round + 1 < self.factors.rounds:
            return carry._replace(factors=factors)
        return Turned(factors, *carry[1:], *self._bases(factors))

    def operator(self, state: EigenbasisState) -> EigenbasisKronecker:
        return state.average

    def damped_inverse(self, state: EigenbasisState, damping: float | Tensor) -> tuple[EigenbasisKronecker, Tensor]:
        """Return ``(average + damping I)⁻¹``, plainly damped, and the damping, ``[]``."""
        dampings = (torch.zeros_like(state.average.rest) + damping).to(state.average.rest.dtype)
        return damped_inverse(state.average, damping), dampings

    def apply(self, inverse: EigenbasisKronecker, gradient: LayerMatrix) -> LayerMatrix:
        return LayerMatrix.of(inverse.two_sided(gradient.joined()), gradient.bias is not None)

    def description(self) -> str:
        return f"{self.factors.description()}, corrected"

    def _bases(self, state: KroneckerState) -> tuple[Tensor, Tensor]:
        return self.factors.output.basis(state.output), self.factors.input.basis(state.input)


def _corrected(turned: Turned, new: Moments) -> EigenbasisState:
    """Return the state after a batch of these moments along the new bases."""
    u, v, kept = turned.output_vectors, turned.input_vectors, turned.kept
    pairs = zip(turned.average.moments(u, v), new, strict=True)
    mixed = Moments(*[kept * old + (1 - kept) * x for old, x in pairs])
    return EigenbasisState(turned.factors, from_moments(u, v, mixed), turned.steps + 1)


def from_moments(output_vectors: Tensor, input_vectors: Tensor, moments: Moments) -> EigenbasisKronecker:
    """Return the operator with these moments whose eigenvalues are equal wherever the moments do not tell."""
    kept, output, input, total = moments
    (d_out, r_out), (d_in, r_in) = output_vectors.shape, input_vectors.shape
    more_out, more_in = d_out - r_out, d_in - r_in
    left = (total - output.sum() - input.sum() + kept.sum()).clamp(min=0)
    along_out = (output - kept.sum(dim=1)).clamp(min=0) / more_in if more_in else kept.mean(dim=1)
    along_in = (input - kept.sum(dim=0)).clamp(min=0) / more_out if more_out else kept.mean(dim=0)
    if more_out and more_in:
        rest = left / (more_out * more_in)
    else:
        rest = along_out.mean() if more_in else along_in.mean()
    return EigenbasisKronecker(output_vectors, input_vectors, kept, along_out, along_in, rest)
