"""A layer's Fisher block as a Kronecker product that is damped as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature.kronecker import KroneckerState, KroneckerStructure
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure, LowRankStructure
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.linalg.damping import ExactInverse, exactly_damped_inverse
from lrkfac.core.linalg.operators import Dense, Kronecker, LowRankPlusDiagonal, Operator
from lrkfac.core.linalg.products import STACKABLE as FACTORS


@dataclass(frozen=True)
class ExactlyDampedStructure(KroneckerStructure):
    """``B ⊗ A`` with the inverse ``(B ⊗ A + λ I)⁻¹``, see ``kronecker``."""

    def fitted(self, d_in: int, d_out: int) -> ExactlyDampedStructure:
        return ExactlyDampedStructure(self.input.fitted(d_in), self.output.fitted(d_out), self.treatment)

    @property
    def stackable(self) -> bool:
        return False  # several are mapped over

    def damped_inverse(self, state: KroneckerState, damping: float | Tensor) -> tuple[ExactInverse, Tensor]:
        """Return ``(B ⊗ A + λ I)⁻¹``, and ``λ``, ``[]``."""
        structures = self.output, self.input
        product = Kronecker(*[_factor(side, one) for side, one in zip(structures, state, strict=True)])
        # Values of a custom structure may be negative.
        semidefinite = all(
            isinstance(side, LowRankPlusDiagonalStructure) or not isinstance(operator, LowRankPlusDiagonal)
            for side, operator in zip(structures, product, strict=True)
        )
        dampings = torch.zeros_like(product.input.trace()) + damping
        return exactly_damped_inverse(product, dampings, semidefinite), dampings

    def apply(self, inverse: ExactInverse, gradient: LayerMatrix) -> LayerMatrix:
        weight, bias = gradient
        if not isinstance(weight, LazyMatrix):
            return LayerMatrix.of(inverse.two_sided(gradient.joined()), bias is not None)
        if bias is None:
            return LayerMatrix(LazyMatrix(*inverse.of_outer_products(weight.left, weight.right), weight.dtype))
        # The bias is one more row, beside a unit vector.
        left = torch.cat([weight.left, bias[..., None, :]], dim=-2)
        unit = F.pad(torch.zeros_like(weight.right[..., :1, :]), (0, 1), value=1.0)
        left, right = inverse.of_outer_products(left, torch.cat([F.pad(weight.right, (0, 1)), unit], dim=-2))
        column = (right[..., None, :, -1] @ left).squeeze(-2)
        return LayerMatrix(LazyMatrix(left, right[..., :-1], weight.dtype), column)

    def size(self, d_in: int, d_out: int) -> int | None:
        return None  # made on "meta" and counted

    def description(self) -> str:
        return f"{super().description()}, exactly damped"


def _factor(structure: FactorStructure, state: Any) -> Operator:
    """Return a factor's average with its eigenvectors, where few of them say all; one that is custom as a matrix."""
    if isinstance(structure, LowRankStructure):
        return structure.eigenpairs(state)
    operator = structure.operator(state)
    return operator if isinstance(operator, FACTORS) else Dense(operator.to_dense())
