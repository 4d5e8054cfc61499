"""A layer's Fisher block as a Kronecker product of two factors, each held by a structure of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.curvature.factors import FactorStructure
from lrkfac.core.layers.description import Treatment
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.operators import Kronecker, split_damping
from lrkfac.core.linalg.products import two_sided


class KroneckerState(NamedTuple):
    """The states of the output factor ``B`` and of the input factor ``A``."""

    output: Any
    input: Any


@dataclass(frozen=True)
class KroneckerStructure:
    """See ``kronecker``."""

    input: FactorStructure
    output: FactorStructure
    treatment: Treatment = "expand"

    def fitted(self, d_in: int, d_out: int) -> KroneckerStructure:
        """The structure to use for a layer of this size: each factor may prefer a smaller, exact form."""
        return KroneckerStructure(self.input.fitted(d_in), self.output.fitted(d_out), self.treatment)

    def init(self, d_in: int, d_out: int, like: Tensor) -> KroneckerState:
        """The state before the first batch."""
        return KroneckerState(self.output.init(d_out, like), self.input.init(d_in, like))

    def update(
        self,
        state: KroneckerState,
        output: Covariance,
        input: Covariance,
        decay: float | Tensor,
    ) -> KroneckerState:
        """The state after one more batch with these factors."""
        return KroneckerState(
            self.output.update(state.output, output, decay), self.input.update(state.input, input, decay)
        )

    def operator(self, state: KroneckerState) -> Kronecker:
        """The running average, ``B ⊗ A``."""
        return Kronecker(self.output.operator(state.output), self.input.operator(state.input))

    def dampings(self, state: KroneckerState, damping: float | Tensor) -> Tensor:
        """``δ_B`` and ``δ_A`` in the inverse, ``[*, 2]``."""
        operator = self.operator(state)
        input_damping, output_damping = split_damping(operator, damping)
        like: Any = operator.output[0]
        return torch.stack([output_damping, input_damping], dim=-1).to(like.dtype)

    def inverse(self, state: KroneckerState, damping: float | Tensor) -> Kronecker:
        """``(B + δ_B I)⁻¹ ⊗ (A + δ_A I)⁻¹`` with ``δ_A δ_B = damping``, split as in ``Kronecker.shifted``."""
        input_damping, output_damping = split_damping(self.operator(state), damping)
        return Kronecker(
            self.output.inverse(state.output, output_damping), self.input.inverse(state.input, input_damping)
        )

    def apply(self, inverse: Kronecker, gradient: Tensor) -> Tensor:
        """The natural gradient ``[d_out, d_in]``."""
        return two_sided(inverse, gradient, None)[0]
