"""A layer's Fisher block by eigenvalues of its own, in the eigenbasis of a Kronecker product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.curvature.factors import kept_weight, no_steps
from lrkfac.core.curvature.kronecker import KroneckerState, KroneckerStructure
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.eigen import orthonormal, without_subnormal
from lrkfac.core.linalg.eigenbasis import CorrectedKronecker
from lrkfac.core.linalg.inverses import damped_inverse
from lrkfac.core.linalg.moments import Moments, RandomMatrix
from lrkfac.core.linalg.operators import Dense, LowRankPlusDiagonal, Operator, dimension


class CorrectedState(NamedTuple):
    """``factors``: those of the product; ``average``: the block; ``steps`` int64 ``[]``."""

    factors: KroneckerState
    average: CorrectedKronecker
    steps: Tensor


@dataclass(frozen=True)
class CorrectedStructure:
    """The diagonal of the block in the basis of the factors (George et al. 2018, arXiv 1806.03884).

    With orthonormal bases ``u_i`` of the output factor and ``v_j`` of the input factor (all eigenvectors where it is
    held densely, unit vectors where it is diagonal, the ``r`` kept directions else), the eigenvalue of ``u_i v_jᵀ`` is
    ``E (u_iᵀ G_n v_j)²`` over examples' gradients ``G_n``, not a product of two eigenvalues. What is left of the second
    moment is spread evenly: of each ``u_i`` over the other directions of the input, of each ``v_j`` over those of the
    output, and the remainder over all that neither basis holds. The diagonal of ``low_rank_plus_diagonal`` helps to
    find its directions and ends there: it has no part in a common eigenbasis, in which every eigenvalue is positive and
    plainly damped. Plain damping lacks the cross terms ``δ_B A + δ_A B`` of the damping that is split between factors:
    the same number damps less.

    When the bases turn, the running average is carried over (``CorrectedKronecker.moments``). The trace, ``E ‖G_n‖²``,
    is kept exactly. Where a factor has equal eigenvalues (a dense one of fewer rows than columns) its basis is
    arbitrary among them, and so is what is measured there.

    Attributes:
        factors: The product that gives the basis.
    """

    factors: KroneckerStructure

    def fitted(self, d_in: int, d_out: int) -> CorrectedStructure:
        """The structure to use for a layer of this size."""
        return CorrectedStructure(self.factors.fitted(d_in, d_out))

    def init(self, d_in: int, d_out: int, like: Tensor) -> CorrectedState:
        """The state before the first batch."""
        factors = self.factors.init(d_in, d_out, like)
        u, v = self._bases(factors)
        r_out, r_in = u.shape[1], v.shape[1]
        nothing = Moments(u.new_zeros(r_out, r_in), u.new_zeros(r_out), v.new_zeros(r_in), u.new_zeros(()))
        return CorrectedState(factors, spread(u, v, nothing), no_steps(like))

    def update(
        self,
        state: CorrectedState,
        output: Covariance,
        input: Covariance,
        gradients: RandomMatrix,
        decay: float | Tensor,
    ) -> CorrectedState:
        """The state after one more batch with these factors and examples' gradients."""
        factors = self.factors.update(state.factors, output, input, decay)
        u, v = self._bases(factors)
        kept = kept_weight(state.steps, state.average.rest, decay)
        pairs = zip(state.average.moments(u, v), gradients.moments(u, v), strict=True)
        mixed = Moments(*[kept * old + (1 - kept) * new for old, new in pairs])
        return CorrectedState(factors, spread(u, v, mixed), state.steps + 1)

    def operator(self, state: CorrectedState) -> CorrectedKronecker:
        """The running average."""
        return state.average

    def dampings(self, state: CorrectedState, damping: float | Tensor) -> Tensor:
        """The damping in the inverse, ``[]``."""
        return (torch.zeros_like(state.average.rest) + damping).to(state.average.rest.dtype)

    def inverse(self, state: CorrectedState, damping: float | Tensor) -> Operator:
        """``(average + damping I)⁻¹``: plain Tikhonov damping."""
        return damped_inverse(state.average, damping)

    def apply(self, inverse: CorrectedKronecker, gradient: Tensor) -> Tensor:
        """The natural gradient ``[d_out, d_in]``."""
        return inverse.two_sided(gradient)

    def _bases(self, state: KroneckerState) -> tuple[Tensor, Tensor]:
        both = self.factors.operator(state)
        return basis(both.output), basis(both.input)


def basis(operator: Operator) -> Float[Tensor, "d r"]:
    """Orthonormal columns along which an operator has something to say."""
    if isinstance(operator, Dense):
        return torch.linalg.eigh(without_subnormal(operator.matrix)).eigenvectors.contiguous()
    if isinstance(operator, LowRankPlusDiagonal):
        return orthonormal(operator.vectors).contiguous()
    like: Any = operator[0]
    return torch.eye(dimension(operator), dtype=like.dtype, device=like.device)


def spread(output_vectors: Tensor, input_vectors: Tensor, moments: Moments) -> CorrectedKronecker:
    """The operator with these moments whose eigenvalues are equal wherever they do not tell."""
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
    return CorrectedKronecker(output_vectors, input_vectors, kept, along_out, along_in, rest)
