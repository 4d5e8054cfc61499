"""Steepest descent in the spectral norm, measured by the factors of a layer's Fisher block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrkfac.core.curvature.kronecker import KroneckerState, KroneckerStructure
from lrkfac.core.curvature.low_rank import LowRankStructure
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import BIAS, JACOBIAN, KINDS
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.linalg.operators import Kronecker
from lrkfac.core.linalg.polar import ITERATIONS, polar
from lrkfac.core.linalg.powers import KroneckerPower, negative_power
from lrkfac.core.linalg.products import two_sided


@dataclass(frozen=True)
class SpectralStructure(KroneckerStructure):
    """The direction ``D = (B + δ_B)^-p polar(W) √max(d_in, d_out) (A + δ_A)^-p``, ``W = (B + δ_B)^-p M (A + δ_A)^-p``.

    Of all ``D`` with ``‖(B + δ_B)^p D (A + δ_A)^p‖₂ ≤ √max(d_in, d_out)`` it has the largest ``⟨M, D⟩``. The damping
    that ``damped_inverse`` takes is a share of the mean eigenvalue of either factor.

    Attributes:
        power: ``p``.
        iterations: Of ``polar``.
        normalized: Whether ``D`` is scaled to root mean square 1; powers are then those of ``B`` and ``A`` divided by
            their mean eigenvalues, which makes no difference to the direction.
    """

    power: float = 0.25
    iterations: int | None = ITERATIONS
    normalized: bool = True

    keeps_rows: ClassVar[bool] = False

    def for_layer(self, layer: Layer) -> SpectralStructure:
        return self.fitted(layer.d_in, layer.d_out)

    def fitted(self, d_in: int, d_out: int) -> SpectralStructure:
        return replace(self, input=_fitted(self.input, d_in), output=_fitted(self.output, d_out))

    def damped_inverse(self, state: KroneckerState, damping: float | Tensor) -> tuple[Any, Tensor]:
        """Return ``(B + δ_B)^-p`` and ``(A + δ_A)^-p``, and ``δ_B, δ_A``, ``[*, 2]``, shares of mean eigenvalues."""
        both = [negative_power(one, self.power, damping) for one in self.operator(state)]
        powers = [one.operator if self.normalized else one.unscaled(self.power) for one in both]
        dampings = torch.stack([one.mean * damping for one in both], dim=-1)
        like: Any = powers[0]
        return KroneckerPower(*powers), dampings.to(like[0].dtype)

    def apply(self, inverse: Any, gradient: LayerMatrix) -> LayerMatrix:
        both, matrix = Kronecker(*inverse), gradient.joined()
        if self.power:
            matrix, _ = two_sided(both, matrix, None)
        direction = math.sqrt(max(matrix.shape[-2:])) * polar(matrix, self.iterations)
        if self.power:
            direction, _ = two_sided(both, direction, None)
        if self.normalized:
            mean_square = direction.square().mean(dim=(-2, -1), keepdim=True)
            direction = direction * torch.where(mean_square > 0, mean_square, 1.0).rsqrt()
        return LayerMatrix.of(direction, gradient.bias is not None)

    def description(self) -> str:
        return f"{super().description()}, orthogonalized"


def _fitted(structure: Any, dimension: int) -> Any:
    """Return the structure of a small factor: all eigenpairs, whose powers need no other decomposition."""
    if isinstance(structure, LowRankStructure):
        return replace(structure, rank=dimension) if dimension <= structure.rank + 2 else structure
    return structure.fitted(dimension)


def matrix_layers(layers: Layers) -> Layers:
    """Return the layers whose weights are matrices between inputs and outputs, which may be orthogonalized.

    Left out are embeddings, scales, shifts, separate biases and whole parameters, with all that share a parameter with
    one of them.
    """

    def is_matrix(layer: Layer) -> bool:
        vectors = BIAS.name, JACOBIAN.name
        return not any(KINDS[kind].one_hot or KINDS[kind].unit_wise or kind in vectors for kind in layer.kinds)

    def parameters(layer: Layer) -> set[int]:
        return {p.index for p in (layer.weight, layer.bias) if p is not None}

    left, others = [x for x in layers if is_matrix(x)], [x for x in layers if not is_matrix(x)]
    while others:
        taken = {i for layer in others for i in parameters(layer)}
        others = [layer for layer in left if parameters(layer) & taken]
        left = [layer for layer in left if layer not in others]
    reasons = {p.index: reason for p, reason in layers.uncovered}
    covered = {i for layer in left for i in parameters(layer)}
    uncovered = [(p, reasons.get(p.index, "no matrix")) for p in layers.parameters if p.index not in covered]
    return replace(layers, layers=tuple(left), uncovered=tuple(uncovered))
