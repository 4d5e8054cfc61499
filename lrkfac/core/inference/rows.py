"""Gradients of single examples as columns that the operators of blocks act on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import floating, floating_dtype
from lrkfac.core.curvature.block_trees import members, stacked_axes
from lrkfac.core.curvature.examples import gradients_of_all_groups
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import KINDS
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.layers.statistics import Statistics


def check_rows(blocks: Mapping[str, Any], layers: Layers, statistics: Statistics, what: str) -> None:
    """Raise unless the statistics have inputs and output gradients of all layers in blocks, by example.

    Raises:
        ValueError: Names the layer without.
    """
    for name in blocks:
        for layer in members(layers, name):
            if not statistics.inputs.get(layer.name) or not statistics.output_gradients.get(layer.name):
                raise ValueError(
                    f"{what}: expected statistics with output gradients of layer {layer.name!r}, got none; make "
                    "evaluator() and the curvature from the same layers, with another estimator than forward_only"
                )
            if not layer.by_example:
                raise ValueError(
                    f"{what}: layer {layer.name!r}: it is not known which rows belong to which example; leave it out "
                    "with curvature.of_layers(names)"
                )


def example_columns(
    name: str, operator: Any, layers: Layers, statistics: Statistics, examples: slice = slice(None)
) -> Tensor:
    """Return gradients of some examples in one block, ``[*, d, k n]`` with the leading axes of its operator."""
    dtype, each = floating_dtype(operator), []
    inside = members(layers, name)
    for layer in inside:
        inputs = split_groups(layer, tuple([floating(a[examples], dtype) for a in statistics.inputs[layer.name]]))
        uses = statistics.output_gradients[layer.name]
        gradients = split_groups(layer, tuple([floating(g[:, examples], dtype) for g in uses]))
        each.append(gradients_of_all_groups(layer, inputs, gradients))
    if len(each) > 1 or not name:
        return torch.cat([x.flatten(1) for x in each], dim=1).mT
    axes = stacked_axes(name, inside, operator)
    matrices = each[0] if inside[0].groups > 1 else each[0].squeeze(1) if each[0].ndim == 4 else each[0]
    return matrices.flatten(1 + axes).movedim(0, -1)


def rows_of(layer: Layer, statistics: Statistics, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return inputs and output gradients of each example and position, ``[n, t, d_in]`` and ``[n, t, d_out]``.

    ``None`` where rows would have to be unfolded, or the layer has several groups.
    """
    if layer.groups > 1 or any(KINDS[kind].rows is None or KINDS[kind].one_hot for kind in layer.kinds):
        return None
    joint, inputs, gradients = layer.appends, [], []
    uses = zip(statistics.inputs[layer.name], statistics.output_gradients[layer.name], layer.kinds, strict=True)
    for a, g, kind in uses:
        of_kind = KINDS[kind].rows
        assert of_kind is not None
        g = floating(g[0], dtype).reshape(g.shape[1], -1, g.shape[-1])
        a = of_kind(floating(a, dtype), layer.d_in - joint).unflatten(0, (g.shape[0], -1)).expand(-1, g.shape[1], -1)
        inputs.append(torch.cat([a, torch.ones_like(a[..., :1])], dim=-1) if joint else a)
        gradients.append(g)
    return torch.cat(inputs, dim=1), torch.cat(gradients, dim=1)
