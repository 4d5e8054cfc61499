"""The derivative of a batch's outputs in the parameters, by the rows of layers: kernel and products, never formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from lrkfac.core.base.dtypes import floating
from lrkfac.core.base.rows import padded
from lrkfac.core.curvature.examples import example_gradients, has_rows_of_numbers, rows_by_example, with_all_examples
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import KINDS
from lrkfac.core.layers.matrix import LayerMatrix, collect, layer_leaves, layer_matrix, split_groups, weight_gradient
from lrkfac.core.layers.statistics import Statistics, Uses


@dataclass(frozen=True)
class OutputJacobian:
    """``J`` ``[n, p]``: the derivatives of ``n`` outputs, times the square root of the likelihood's Hessian.

    Its rows are the gradients ``Σ g aᵀ`` of each column and example, ``n = k N``, of all layers. So the batch's Fisher
    matrix is ``scale Jᵀ J``.

    Attributes:
        layers: The layers.
        inputs: Inputs of each, see ``Statistics``.
        gradients: Gradients at its outputs.
    """

    layers: Layers
    inputs: dict[str, Uses]
    gradients: dict[str, Uses]

    @staticmethod
    def of(layers: Layers, statistics: Statistics, dtype: torch.dtype) -> OutputJacobian:
        """Return the derivative from statistics, to be used in a dtype."""
        examples = max([a.shape[0] for layer in layers for a in statistics.inputs[layer.name]])
        inputs, gradients = {}, {}
        for layer in layers:
            uses = statistics.inputs[layer.name], statistics.output_gradients[layer.name]
            a, g = (tuple([floating(x, dtype) for x in one]) for one in uses)
            inputs[layer.name], gradients[layer.name] = with_all_examples(a, g, examples)
        return OutputJacobian(layers, inputs, gradients)

    def kernel(self) -> Float[Tensor, "n n"]:
        """Return ``J Jᵀ``, the sum of the kernels of all layers."""
        total: Tensor | None = None
        for layer in self.layers:
            parts = split_groups(layer, self.inputs[layer.name]), split_groups(layer, self.gradients[layer.name])
            for group in range(layer.groups):
                one = parts if layer.groups == 1 else [tuple([x[group] for x in part]) for part in parts]
                kernel = layer_kernel(layer, *one)
                total = kernel if total is None else total + kernel
        assert total is not None, "a description without layers is refused before"
        return total

    def along(self, leaves: Sequence[Any]) -> Float[Tensor, "n"]:
        """Return ``J q`` for ``q`` in the leaves of a parameter tree, of which uncovered ones do not count."""
        changes = []
        for layer in self.layers:
            zeros = self._coefficients(layer)
            _, along = vjp(partial(self._combined, layer), zeros)
            changes.append(along(layer_matrix(layer, leaves).joined().to(zeros.dtype))[0])
        return torch.stack(changes).sum(dim=0).reshape(-1)

    def transposed(self, coefficients: Float[Tensor, "n"]) -> dict[int, Any]:
        """Return ``Jᵀ v``, the covered parameters' leaves by index."""
        leaves: dict[int, Any] = {}
        for layer in self.layers:
            matrix = self._combined(layer, coefficients.reshape(self._coefficients(layer).shape))
            collect(leaves, layer_leaves(layer, LayerMatrix.of(matrix, layer.bias is not None)))
        return leaves

    def _coefficients(self, layer: Layer) -> Tensor:
        """Return zeros ``[k, N]``."""
        g = self.gradients[layer.name][0]
        return g.new_zeros(g.shape[:2])

    def _combined(self, layer: Layer, coefficients: Tensor) -> Tensor:
        """Return the sum of the rows of ``J`` times coefficients ``[k, N]``, the part of one layer as its matrix."""
        g = [
            (coefficients.reshape(*coefficients.shape, *[1] * (x.ndim - 2)) * x).sum(dim=0)
            for x in self.gradients[layer.name]
        ]
        parts = split_groups(layer, self.inputs[layer.name]), split_groups(layer, tuple(g))
        of_group = partial(weight_gradient, layer, joint=layer.appends)
        return of_group(*parts) if layer.groups == 1 else vmap(of_group)(*parts)


def residuals(statistics: Statistics) -> Float[Tensor, "n"]:
    """Return ``ρ`` of all heads in the order of the rows of ``J``, zeros behind where a head has fewer examples."""
    examples = max([x.shape[1] for x in statistics.residuals])
    return torch.cat([padded(x.mT, examples).mT for x in statistics.residuals]).reshape(-1)


def layer_kernel(layer: Layer, inputs: Uses, gradients: Uses) -> Float[Tensor, "n n"]:
    """Return the inner products of the gradients ``Σ_t g_t a_tᵀ`` of one group, for all columns and examples.

    By ``Σ_{t,s} (g_tᵀ g_s) (a_tᵀ a_s)`` over positions where that takes fewer operations, else by the gradients
    themselves, of so many output units at a time that they hold no more numbers than the kernel.
    """
    kinds = [KINDS[kind] for kind in layer.kinds]
    if has_rows_of_numbers(layer):
        a, g = rows_by_example(layer, inputs, gradients)
        positions = a.shape[1]
        if positions**2 * (layer.d_in + layer.d_out) <= layer.d_in * layer.d_out or positions == 1:
            return _by_positions(a, g)
    examples = gradients[0].shape[0] * gradients[0].shape[1]
    units = max(examples // layer.d_in, 1)
    channels = [kind.channel(options) for kind, options in zip(kinds, layer.options, strict=True)]
    if units >= layer.d_out or not all(kind.operation is not None and kind.picks for kind in kinds):
        return _by_gradients(layer, inputs, gradients)
    kernel = gradients[0].new_zeros(examples, examples)
    for part in zip(*[g.split(units, dim=axis) for g, axis in zip(gradients, channels, strict=True)], strict=True):
        kernel = kernel + _by_gradients(layer, inputs, part)
    return kernel


def _by_positions(a: Float[Tensor, "N t i"], g: Float[Tensor, "k N t o"]) -> Tensor:
    columns, examples, positions, _ = g.shape
    kernel: Any = 0
    for t in range(positions):
        for s in range(t + 1):
            of_inputs = a[:, t] @ a[:, s].mT
            of_gradients = g[:, :, t].flatten(0, 1) @ g[:, :, s].flatten(0, 1).mT
            blocks = of_gradients.reshape(columns, examples, columns, examples) * of_inputs[:, None]
            product = blocks.reshape(columns * examples, columns * examples)
            kernel = kernel + (product if s == t else product + product.mT)
    return kernel


def _by_gradients(layer: Layer, inputs: Uses, gradients: Uses) -> Tensor:
    rows = example_gradients(layer, inputs, gradients).flatten(2).flatten(0, 1)
    return rows @ rows.mT
