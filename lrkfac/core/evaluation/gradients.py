"""Gradients of layers from captured rows, kept as lazy matrices where that is cheaper."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.trees import scaled
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import KINDS, LINEAR
from lrkfac.core.layers.matrix import collect, split_groups, turned, weight_gradient
from lrkfac.core.layers.probes import OutputSpec
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.layers.views import TRANSPOSITIONS, scatter_view


def thin_layers(layers: Layers, specs: dict[str, list[OutputSpec]]) -> tuple[Layer, ...]:
    """The layers whose gradient is cheaper to hold, precondition and measure by its rows than as a matrix.

    With ``n`` rows and factors of rank ``r``, rows are preconditioned in ``4 n r (d_in + d_out)`` operations and their
    inner products, which ``clip_by_kl`` needs, take ``2 n² (d_in + d_out)``; the matrix takes ``8 r d_in d_out`` and
    some passes over memory, of the price of as many operations again. So rows win where ``2 n (d_in + d_out) ≤
    d_in d_out``: where they hold at most half as many numbers. Only where the weight is a matrix of its own, used once.
    """
    found = []
    shared = Counter(p.index for layer in layers for p in (layer.weight, layer.bias) if p is not None)
    for layer in layers:
        own = all(shared[p.index] == 1 for p in (layer.weight, layer.bias) if p is not None)
        plain = len(layer.weight.shape) == 2 and all(step.name in TRANSPOSITIONS for step in layer.weight.view)
        if layer.kinds == (LINEAR.name,) and own and plain:
            ((source, use),) = layer.sites
            rows = math.prod(specs[source][use].shape) // layer.d_out
            if 2 * rows * (layer.d_in + layer.d_out) <= layer.d_in * layer.d_out:
                found.append(layer)
    return tuple(found)


def by_rows(layer: Layer, inputs: Uses, gradients: Uses) -> dict[int, Any]:
    """The gradients of a thin layer's parameters, by their index; that of the weight not formed."""
    joint = layer.bias is not None
    a, g = inputs[0].reshape(-1, layer.d_in - joint), gradients[0].reshape(-1, layer.d_out)
    dtype = widest(a.dtype, g.dtype)  # two under autocast
    found: dict[int, Any] = {layer.weight.index: turned(layer, LazyMatrix(g.to(dtype), a.to(dtype), dtype))}
    if layer.bias is not None:
        found[layer.bias.index] = scatter_view(layer.bias.view, layer.bias.shape, g.to(dtype).sum(dim=0))
    return found


def gradients_of(layer: Layer, inputs: Uses, gradients: Uses, scale: Tensor | None = None) -> dict[int, Tensor]:
    """``sum of g aᵀ`` over uses, examples and positions, and that of ``g``: the leaves of a layer by their index.

    With a ``scale``, ``[]``, times that: it multiplies rows where they are fewer numbers than the weight.
    """
    if scale is not None:
        if sum(g.numel() for g in gradients) > math.prod(layer.weight.shape):
            return {i: scaled(scale, found) for i, found in gradients_of(layer, inputs, gradients).items()}
        gradients = tuple(scaled(scale, list(gradients)))
    parts = split_groups(layer, inputs), split_groups(layer, gradients)
    of_weight = partial(weight_gradient, layer, joint=False)
    weight = of_weight(*parts) if layer.groups == 1 else vmap(of_weight)(*parts)
    found = {layer.weight.index: scatter_view(layer.weight.view, layer.weight.shape, weight.flatten(0, -2))}
    if layer.bias is not None:
        uses = zip(inputs, gradients, layer.kinds, layer.options, strict=True)
        rows = [g.to(widest(a.dtype, g.dtype)).movedim(KINDS[kind].channel(o), -1) for a, g, kind, o in uses]
        bias = torch.stack([x.flatten(0, -2).sum(dim=0) for x in rows]).sum(dim=0)
        collect(found, {layer.bias.index: scatter_view(layer.bias.view, layer.bias.shape, bias)})
    return found
