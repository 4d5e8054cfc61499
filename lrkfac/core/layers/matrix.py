"""Layers and matrices: a layer's part of a parameter tree as a matrix, its gradient from rows, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.rows import as_real
from lrkfac.core.layers.description import Layer
from lrkfac.core.layers.kind import Kind, Options
from lrkfac.core.layers.kinds import KINDS
from lrkfac.core.layers.placement import PlacementError
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.layers.views import apply_view, scatter_view


def split_groups(layer: Layer, tensors: Uses) -> Uses:
    """Return inputs or output gradients as ``[groups, ...]``; unchanged for a layer of one group, or if empty."""
    if layer.groups == 1 or not tensors:
        return tensors
    split = []
    for x, kind, options in zip(tensors, layer.kinds, layer.options, strict=True):
        channel = KINDS[kind].channel(options)
        split.append(x.unflatten(channel, (layer.groups, -1)).movedim(channel - 1, 0))
    return tuple(split)


def collect(leaves: dict[int, Any], more: dict[int, Any]) -> None:
    """Add ``more`` to ``leaves``, in place: several layers may share one parameter."""
    for i, leaf in more.items():
        leaves[i] = leaves[i] + leaf if i in leaves else leaf


def prepared(layer: Layer, inputs: Uses, gradients: Uses, examples: int) -> tuple[Uses, Uses]:
    """Return captured inputs and gradients, these with a leading axis, in the standard form of the layer's kinds.

    Complex ones become real, of twice as many positions.
    """
    uses = zip(inputs, gradients, layer.kinds, layer.options, layer.placements, strict=True)
    try:
        pairs = [KINDS[kind].prepare(a, g, examples, options, place) for a, g, kind, options, place in uses]
    except PlacementError as error:
        raise ValueError(f"layer {layer.name!r}: {error}") from error
    return tuple(as_real(a, 1) for a, _ in pairs), tuple(as_real(g, 2) for _, g in pairs)


class LayerMatrix(NamedTuple):
    """A layer's part of a parameter tree as a matrix, with the column of a joint bias apart.

    Attributes:
        weight: ``[d_out, d_in]``, or ``[groups, d_out, d_in]``; a lazy matrix without terms where the leaf is lazy.
        bias: ``[d_out]`` or ``[groups, d_out]``, or ``None`` without a joint bias; ``d_in`` then counts one more.
    """

    weight: Any
    bias: Tensor | None = None

    @staticmethod
    def of(matrix: Tensor, joint: bool) -> LayerMatrix:
        """Return the parts of a matrix whose last column is that of a joint bias."""
        return LayerMatrix(matrix[..., :-1], matrix[..., -1]) if joint else LayerMatrix(matrix)

    def joined(self) -> Tensor:
        """Return the matrix, formed."""
        weight: Tensor = self.weight.dense() if isinstance(self.weight, LazyMatrix) else self.weight
        return weight if self.bias is None else torch.cat([weight, self.bias[..., None]], dim=-1)


def layer_matrix(layer: Layer, leaves: Sequence[Any]) -> LayerMatrix:
    """Return a layer's part of the leaves of a parameter tree."""
    weight = leaves[layer.weight.index]
    if isinstance(weight, LazyMatrix) and weight.terms:
        weight = weight.dense()
    shape = (layer.groups, layer.d_out) if layer.groups > 1 else (layer.d_out,)
    if isinstance(weight, LazyMatrix):
        weight = turned(layer, weight)
    else:
        weight = apply_view(layer.weight.view, weight).reshape(*shape, -1)
    if layer.bias is None:
        return LayerMatrix(weight)
    return LayerMatrix(weight, apply_view(layer.bias.view, leaves[layer.bias.index]).reshape(shape))


def flat(matrices: Sequence[Tensor]) -> Tensor:
    """Return the entries of all matrices one after another, in the widest of their dtypes."""
    dtype = widest(*[matrix.dtype for matrix in matrices])
    return torch.cat([matrix.to(dtype).reshape(-1) for matrix in matrices])


def layer_leaves(layer: Layer, matrix: LayerMatrix) -> dict[int, Any]:
    """Return the leaves that a layer's matrix makes up, by the parameter's index: the inverse of ``layer_matrix``."""
    weight, bias = matrix
    if isinstance(weight, LazyMatrix):
        leaves: dict[int, Any] = {layer.weight.index: turned(layer, weight)}
    else:
        flat = weight.reshape(layer.groups * layer.d_out, -1) if layer.groups > 1 else weight
        leaves = {layer.weight.index: scatter_view(layer.weight.view, layer.weight.shape, flat)}
    if layer.bias is not None and bias is not None:
        collect(leaves, {layer.bias.index: scatter_view(layer.bias.view, layer.bias.shape, bias)})
    return leaves


def turned(layer: Layer, weight: LazyMatrix) -> LazyMatrix:
    """Return a lazy matrix from the parameter to the layer's matrix or back: its views are transpositions alone."""
    return weight.t() if len(layer.weight.view) % 2 else weight


def weight_gradient(layer: Layer, inputs: Uses, gradients: Uses, joint: bool) -> Tensor:
    """Return ``sum of g aᵀ`` over uses, examples and positions of one group, ``joint`` with the column of a bias."""
    d = layer.d_in - layer.appends
    parts = [
        joined_gradient(KINDS[kind], a, g, d, options, joint)
        for a, g, kind, options in zip(inputs, gradients, layer.kinds, layer.options, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def joined_gradient(kind: Kind, a: Tensor, g: Tensor, d: int, options: Options, joint: bool) -> Tensor:
    """Return ``sum of g aᵀ``, ``[k, d]`` or, with the column of a joint bias, ``[k, d + 1]``."""
    if a.is_floating_point() and a.dtype != g.dtype:  # under autocast
        dtype = widest(a.dtype, g.dtype)
        a, g = a.to(dtype), g.to(dtype)
    matrix = kind.transpose(a, g, d, options)
    if not joint:
        return matrix
    rows = g.movedim(kind.channel(options), -1)
    return torch.cat([matrix, rows.reshape(-1, rows.shape[-1]).sum(dim=0)[:, None]], dim=1)
