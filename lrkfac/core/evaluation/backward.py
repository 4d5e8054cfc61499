"""The backward pass of the loss through a captured forward pass."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.trees import scaled
from lrkfac.core.evaluation.by_example import ProbeGradients, check_memory
from lrkfac.core.evaluation.capture import Captured, LayerRows
from lrkfac.core.evaluation.gradients import layer_gradients, lazy_gradients
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.layers.matrix import collect


class LossRows(NamedTuple):
    """The backward pass of the loss.

    Attributes:
        loss: ``[]``.
        free: Gradients of the free leaves, by index, divided by ``scale``.
        rows: Rows of the captured layers, their output gradients divided by ``scale``.
        scale: ``[]``: rows then are those of the sum of the terms; ``None`` for those of the loss itself.
    """

    loss: Tensor
    free: dict[int, Tensor]
    rows: LayerRows
    scale: Tensor | None


def loss_rows(objective: Objective, captured: Captured, targets: list[Tensor], summed: bool) -> LossRows:
    """Take the gradient of the loss back to free leaves and layers; with ``summed``, that of the sum of its terms."""
    cotangent, loss = objective.cotangent(captured.outputs, targets)
    scale = objective.heads.normalization(captured.outputs, targets)[0] if summed else None
    if scale is not None:
        divisor = torch.where(scale == 0, 1, scale)  # where no term counts, rows are zero
        cotangent = [(c / divisor).to(c.dtype) for c in cotangent]
    free, probe_gradients = captured.transpose(cotangent)
    # Whole parameters are free leaves here: their examples' gradients matter where those of the loss are statistics.
    of_examples: ProbeGradients = {}
    if summed and captured.layers.jacobians and not captured.uneven:
        check_memory(captured.layers, captured.outputs, 1)
        of_examples = captured.by_example(cotangent)
    return LossRows(loss, free, captured.single_rows({**captured.probes, **probe_gradients, **of_examples}), scale)


def leaf_gradients(captured: Captured, backward: LossRows, lazy: Collection[str]) -> dict[int, Any]:
    """Return the gradient of the loss of every leaf, by index.

    Weights take no part in the backward pass: their gradients follow from its rows, once.

    Args:
        captured: The forward pass.
        backward: From ``loss_rows``.
        lazy: Names of the layers whose weight's gradient becomes a ``LazyMatrix``.
    """
    scale = backward.scale
    gradients: dict[int, Any] = dict(backward.free if scale is None else scaled(scale, backward.free))
    for layer in captured.layers.followed:
        inputs, output_gradients = backward.rows[layer.name]
        if layer.name in lazy:
            leaves = lazy_gradients(layer, inputs, output_gradients)
            gradients |= leaves if scale is None else scaled(scale, leaves)
        else:
            collect(gradients, layer_gradients(layer, inputs, tuple(g[0] for g in output_gradients), scale))
    return gradients
