"""How a layer's Fisher block is held: today as a Kronecker product of two factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.factors import FactorStructure
from lrkfac.core.operators import Kronecker, split_damping
from lrkfac.core.types import Covariance


class KroneckerState(NamedTuple):
    """The states of the output factor ``B`` and of the input factor ``A``."""

    output: Any
    input: Any


@dataclass(frozen=True)
class KroneckerStructure:
    """See ``kronecker``."""

    input: FactorStructure
    output: FactorStructure

    def fitted(self, d_in: int, d_out: int) -> KroneckerStructure:
        """The structure to use for a layer of this size: each factor may prefer a smaller, exact form."""
        return KroneckerStructure(self.input.fitted(d_in), self.output.fitted(d_out))

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

    def inverse(self, state: KroneckerState, damping: float | Tensor) -> Kronecker:
        """``(B + δ_B I)⁻¹ ⊗ (A + δ_A I)⁻¹`` with ``δ_A δ_B = damping``, split as in ``Kronecker.shifted``."""
        input_damping, output_damping = split_damping(self.operator(state), damping)
        return Kronecker(
            self.output.inverse(state.output, output_damping), self.input.inverse(state.input, input_damping)
        )


def kronecker(input: FactorStructure, output: FactorStructure) -> KroneckerStructure:
    """A layer's Fisher block as ``B ⊗ A`` (Martens & Grosse 2015, arXiv 1503.05671, section 3).

    Args:
        input: What holds ``A``, the second moment of the layer's inputs.
        output: What holds ``B``, the second moment of the gradients at the layer's outputs.

    Raises:
        TypeError: If an argument is not one of ``dense()``, ``diagonal()``, ``low_rank(rank)`` and
            ``low_rank_plus_diagonal(rank)``, or an object with the same methods.
    """
    for name, value in {"input": input, "output": output}.items():
        methods = ("fitted", "init", "update", "operator", "inverse")
        if isinstance(value, KroneckerStructure) or not all(hasattr(value, method) for method in methods):
            raise TypeError(f"{name}: expected a factor structure such as dense() or low_rank(32), got {value!r}")
    return KroneckerStructure(input, output)
