"""Gradients of single examples as columns that the operators of blocks act on, and derivatives of outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import floating, floating_dtype
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.block_trees import members, stacked_axes
from lrkfac.core.curvature.examples import gradients_of_all_groups
from lrkfac.core.evaluation.evaluator import evaluator
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.layers.statistics import Statistics
from lrkfac.core.likelihoods.gaussian import gaussian


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


def output_derivatives(
    model: Callable[[Tree, Tree], Any], layers: Layers, params: Tree, inputs: Tree, outputs: Tensor, names: Any = None
) -> Statistics:
    """Return inputs of layers and the derivatives of every output at theirs, a column for each output of an example.

    Args:
        model: Of the layers.
        layers: From ``find_layers``.
        params: Where to differentiate.
        inputs: Of the batch.
        outputs: What the model returns there.
        names: Of some layers; all by default.
    """
    evaluate = evaluator(model, gaussian(), layers, estimator="exact")
    statistics = evaluate(params, inputs, torch.zeros_like(outputs), layers=names).statistics
    assert statistics is not None
    return statistics
