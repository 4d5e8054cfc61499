"""Layers and matrices: a layer's part of a parameter tree as a matrix, its gradient from rows, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.rows import with_ones
from lrkfac.core.layers.description import Layer
from lrkfac.core.layers.kinds import KINDS, Kind, Options
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.layers.views import apply_view, scatter_view


def split_groups(layer: Layer, tensors: Uses) -> Uses:
    """Inputs or output gradients as ``[groups, ...]``; unchanged for a layer of one group, or if empty."""
    if layer.groups == 1 or not tensors:
        return tensors
    split = []
    for x, kind, options in zip(tensors, layer.kinds, layer.options, strict=True):
        channel = KINDS[kind].channel(options)
        split.append(x.unflatten(channel, (layer.groups, -1)).movedim(channel - 1, 0))
    return tuple(split)


def collect(found: dict[int, Any], more: dict[int, Any]) -> None:
    """Adds what several layers make of one parameter."""
    for i, leaf in more.items():
        found[i] = found[i] + leaf if i in found else leaf


def prepared(layer: Layer, inputs: Uses, gradients: Uses, examples: int) -> tuple[Uses, Uses]:
    """What was captured, ``gradients`` with a leading axis, in the standard form of the layer's kinds."""
    pairs = [
        KINDS[kind].prepare(a, g, examples, options)
        for a, g, kind, options in zip(inputs, gradients, layer.kinds, layer.options, strict=True)
    ]
    return tuple(a for a, _ in pairs), tuple(g for _, g in pairs)


def to_matrix(layer: Layer, leaves: list[Any]) -> Any:
    """The layer's part of a parameter tree as ``[d_out, d_in]``, or ``[groups, d_out, d_in]``; held by its rows where
    the weight's leaf is an ``LazyMatrix``.
    """
    weight = leaves[layer.weight.index]
    if isinstance(weight, LazyMatrix) and weight.terms:
        weight = weight.dense()
    if isinstance(weight, LazyMatrix):
        weight = turned(layer, weight)
        return weight if layer.bias is None else LazyMatrix(weight.left, with_ones(weight.right), weight.dtype)
    shape = (layer.groups, layer.d_out, -1) if layer.groups > 1 else (layer.d_out, -1)
    matrix = apply_view(layer.weight.view, weight).reshape(shape)
    if layer.bias is None:
        return matrix
    bias = apply_view(layer.bias.view, leaves[layer.bias.index])
    return torch.cat([matrix, bias.reshape(*shape[:-1], 1)], dim=-1)


def turned(layer: Layer, weight: LazyMatrix) -> LazyMatrix:
    """From the parameter to the matrix or back: views of what is held by its rows are transpositions alone."""
    return weight.t() if len(layer.weight.view) % 2 else weight


def from_matrices(layers: list[Layer], matrices: list[Tensor]) -> dict[int, Any]:
    """The inverse of ``to_matrix``: from a parameter's index to the leaf that the layers' matrices make up."""
    found: dict[int, Any] = {}
    for layer, matrix in zip(layers, matrices, strict=True):
        joint = layer.bias is not None
        flat = matrix.reshape(layer.groups * layer.d_out, layer.d_in)
        parts = [(layer.weight, flat[:, :-1] if joint else flat)]
        if layer.bias is not None:
            parts.append((layer.bias, flat[:, -1]))
        for parameter, part in parts:
            collect(found, {parameter.index: scatter_view(parameter.view, parameter.shape, part)})
    return found


def gradient(layer: Layer, inputs: Uses, gradients: Uses, joint: bool) -> Tensor:
    """``sum of g aᵀ`` over uses, examples and positions of one group, with or without the column of a joint bias."""
    d = layer.d_in - (layer.bias is not None)
    parts = [
        joined_gradient(KINDS[kind], a, g, d, options, joint)
        for a, g, kind, options in zip(inputs, gradients, layer.kinds, layer.options, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def joined_gradient(kind: Kind, a: Tensor, g: Tensor, d: int, options: Options, joint: bool) -> Tensor:
    """``sum of g aᵀ``, ``[k, d]`` or, with the column of a joint bias, ``[k, d + 1]``."""
    if a.is_floating_point() and a.dtype != g.dtype:  # under autocast
        dtype = widest(a.dtype, g.dtype)
        a, g = a.to(dtype), g.to(dtype)
    matrix = kind.transpose(a, g, d, options)
    if not joint:
        return matrix
    rows = g.movedim(kind.channel(options), -1)
    return torch.cat([matrix, rows.reshape(-1, rows.shape[-1]).sum(dim=0)[:, None]], dim=1)
