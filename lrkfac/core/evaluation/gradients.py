"""Gradients of layers from captured rows, kept as lazy matrices where that is cheaper."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import in_dtype, widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.trees import scaled
from lrkfac.core.evaluation.specs import Specs
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import KINDS, LINEAR
from lrkfac.core.layers.matrix import LayerMatrix, collect, layer_leaves, split_groups, turned, weight_gradient
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.layers.views import TRANSPOSITIONS, scatter_view


def thin_layers(layers: Layers, specs: Specs) -> tuple[Layer, ...]:
    """Return the layers whose gradient is cheaper to hold, precondition and measure by its rows than as a matrix.

    With ``n`` rows and factors of rank ``r``, rows are preconditioned in ``4 n r (d_in + d_out)`` operations and their
    inner products, which ``clip_by_kl`` needs, take ``2 n² (d_in + d_out)``; the matrix takes ``8 r d_in d_out`` and
    some passes over memory, of the price of as many operations again. So rows win where they hold at most half as many
    numbers, ``2 n (d_in + d_out) ≤ d_in d_out``. The weight must be a matrix that one use of one layer has alone.
    """
    thin = []
    users = Counter(p.index for layer in layers for p in (layer.weight, layer.bias) if p is not None)
    for layer in layers:
        unshared = all(users[p.index] == 1 for p in (layer.weight, layer.bias) if p is not None)
        plain = len(layer.weight.shape) == 2 and all(step.name in TRANSPOSITIONS for step in layer.weight.view)
        if layer.kinds == (LINEAR.name,) and unshared and plain and not layer.carried:
            ((source, use),) = layer.sites
            rows = math.prod(specs[source][use].shape) // layer.d_out
            if 2 * rows * (layer.d_in + layer.d_out) <= layer.d_in * layer.d_out:
                thin.append(layer)
    return tuple(thin)


def lazy_gradients(layer: Layer, inputs: Uses, output_gradients: Uses) -> dict[int, Any]:
    """Return the gradients of a thin layer's parameters by their index; the weight's is a ``LazyMatrix``."""
    joint = layer.bias is not None
    a, g = inputs[0].reshape(-1, layer.d_in - joint), output_gradients[0].reshape(-1, layer.d_out)
    dtype = widest(a.dtype, g.dtype)  # two under autocast
    gradients: dict[int, Any] = {layer.weight.index: turned(layer, LazyMatrix(g.to(dtype), a.to(dtype), dtype))}
    if layer.bias is not None:
        gradients[layer.bias.index] = scatter_view(layer.bias.view, layer.bias.shape, g.to(dtype).sum(dim=0))
    return gradients


def layer_gradients(
    layer: Layer, inputs: Uses, output_gradients: Uses, scale: Tensor | None = None
) -> dict[int, Tensor]:
    """Return the gradients of a layer's parameters by their index.

    The weight's is ``Σ g aᵀ`` over uses, examples and positions, the bias's ``Σ g``. A ``scale``, ``[]``, multiplies
    both: by way of the rows where these are fewer numbers than the weight.
    """
    if scale is not None:
        if sum(g.numel() for g in output_gradients) > math.prod(layer.weight.shape):
            return {i: scaled(scale, leaf) for i, leaf in layer_gradients(layer, inputs, output_gradients).items()}
        output_gradients = tuple(scaled(scale, list(output_gradients)))
    parts = split_groups(layer, inputs), split_groups(layer, output_gradients)
    if layer.carried:
        return layer_leaves(layer, LayerMatrix.of(weight_gradient(layer, *parts, joint=False), joint=True))
    of_weight = partial(weight_gradient, layer, joint=False)
    weight = of_weight(*parts) if layer.groups == 1 else vmap(of_weight)(*parts)
    gradients = {layer.weight.index: scatter_view(layer.weight.view, layer.weight.shape, weight.flatten(0, -2))}
    if layer.bias is not None:
        uses = zip(inputs, output_gradients, layer.kinds, layer.options, strict=True)
        rows = [in_dtype(g, widest(a.dtype, g.dtype)).movedim(KINDS[kind].channel(o), -1) for a, g, kind, o in uses]
        sums = [x.flatten(0, -2).sum(dim=0) for x in rows]
        bias = sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
        collect(gradients, {layer.bias.index: scatter_view(layer.bias.view, layer.bias.shape, bias)})
    return gradients
