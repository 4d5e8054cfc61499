"""What structures see of a layer: its factors by their action, its gradient as a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from lrkfac.core.layers import KINDS, Kind, Options
from lrkfac.core.tree import wide
from lrkfac.core.types import Layer


@dataclass(frozen=True)
class InputCovariance:
    """``A = mean over rows of a aᵀ`` of one group, touched only through the layer's own operation.

    Half-precision inputs are treated in float32.

    Attributes:
        layer: The layer's description.
        inputs: What the operation received, one tensor for each use.
    """

    layer: Layer
    inputs: tuple[Tensor, ...]

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """``A V`` by the operation with ``V`` in place of its weights, and its transpose."""
        weights, constants = (vectors[:-1], vectors[-1]) if self.layer.bias else (vectors, None)
        total, rows = torch.zeros_like(vectors), 0
        for a, options in zip(self.inputs, self.layer.options, strict=True):
            kind, a = self._kind, wide(a)
            s = kind.operation(a, weights.mT, options)
            trailing = [1] * (-kind.channel(options) - 1)
            s = s if constants is None else s + constants.reshape(-1, *trailing)
            total = total + _joined(kind, a, s, weights.shape[0], options, self.layer.bias is not None).mT
            rows += s.numel() // vectors.shape[1]
        return total / rows

    def diagonal(self) -> Float[Tensor, "d"]:
        """The mean of the squared rows, by the operation's transpose on the squared input."""
        joint = self.layer.bias is not None
        d = self.layer.d_in - joint
        total, rows = None, 0
        for a, options in zip(self.inputs, self.layer.options, strict=True):
            a = wide(a)
            one = torch.ones_like(self._kind.operation(a, a.new_zeros(1, d), options))
            squares = _joined(self._kind, a.square(), one, d, options, joint)[0]
            total = squares if total is None else total + squares
            rows += one.numel()
        assert total is not None
        return total / rows

    def trace(self) -> Float[Tensor, ""]:
        """The mean squared length of a row."""
        return self.diagonal().sum()

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix: from the rows where they are at hand, else column by column by ``matvec``."""
        kind, joint = self._kind, self.layer.bias is not None
        if kind.rows is None:
            like = wide(self.inputs[0])
            return self.matvec(torch.eye(self.layer.d_in, dtype=like.dtype, device=like.device))
        rows = torch.cat([kind.rows(wide(a), self.layer.d_in - joint) for a in self.inputs])
        if joint:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        return rows.mT @ rows / rows.shape[0]

    @property
    def _kind(self) -> Kind:
        return KINDS[self.layer.kind]


@dataclass(frozen=True)
class RowCovariance:
    """``scale * rowsᵀ rows`` with ``rows`` ``[n, d]``."""

    rows: Tensor
    scale: Tensor

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """``C V``."""
        return self.scale * (self.rows.mT @ (self.rows @ vectors))

    def diagonal(self) -> Float[Tensor, "d"]:
        """The diagonal."""
        return self.scale * self.rows.square().sum(dim=0)

    def trace(self) -> Float[Tensor, ""]:
        """The trace."""
        return self.scale * self.rows.square().sum()

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return self.scale * (self.rows.mT @ self.rows)


def output_covariance(layer: Layer, gradients: tuple[Tensor, ...], scale: Tensor) -> RowCovariance:
    """``B = scale * sum of g gᵀ`` of one group over uses, samples, examples and positions."""
    rows = []
    for g, options in zip(gradients, layer.options, strict=True):
        channels_last = wide(g).movedim(KINDS[layer.kind].channel(options), -1)
        rows.append(channels_last.reshape(-1, layer.d_out))
    return RowCovariance(rows[0] if len(rows) == 1 else torch.cat(rows), scale.to(rows[0].dtype))


def split_groups(layer: Layer, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs or output gradients as ``[groups, ...]``; unchanged for a layer of one group."""
    if layer.groups == 1:
        return tensors
    split = []
    for x, options in zip(tensors, layer.options, strict=True):
        channel = KINDS[layer.kind].channel(options)
        split.append(x.unflatten(channel, (layer.groups, -1)).movedim(channel - 1, 0))
    return tuple(split)


def gradient_matrix(layer: Layer, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """``sum of g aᵀ`` over uses, examples and positions: ``[d_out, d_in]``, or ``[groups, d_out, d_in]``."""
    joint = layer.bias is not None

    def one_group(inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
        uses = zip(inputs, gradients, layer.options, strict=True)
        parts = [_joined(KINDS[layer.kind], a, g, layer.d_in - joint, options, joint) for a, g, options in uses]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    inputs, gradients = split_groups(layer, inputs), split_groups(layer, gradients)
    return one_group(inputs, gradients) if layer.groups == 1 else vmap(one_group)(inputs, gradients)


def to_matrix(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight and joint bias as ``[d_out, d_in]``, or ``[groups, d_out, d_in]``."""
    shape = (layer.groups, layer.d_out, -1) if layer.groups > 1 else (layer.d_out, -1)
    matrix = weight.reshape(shape)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(*shape[:-1], 1)], dim=-1)


def from_matrix(layer: Layer, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The inverse of ``to_matrix``."""
    if layer.bias is None:
        return matrix.reshape(layer.weight.shape), None
    return matrix[..., :-1].reshape(layer.weight.shape), matrix[..., -1].reshape(layer.bias.shape)


def _joined(kind: Kind, a: Tensor, g: Tensor, d: int, options: Options, joint: bool) -> Tensor:
    """``sum of g aᵀ``, ``[k, d]`` or, with the column of a joint bias, ``[k, d + 1]``."""
    dtype = torch.promote_types(a.dtype, g.dtype)  # they differ under autocast
    matrix = kind.transpose(a.to(dtype), g.to(dtype), d, options)
    if not joint:
        return matrix
    rows = g.movedim(kind.channel(options), -1)
    return torch.cat([matrix, rows.reshape(-1, rows.shape[-1]).sum(dim=0)[:, None]], dim=1)
