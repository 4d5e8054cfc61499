"""Natural gradients of all blocks; those of equal layers are made in one batched call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating, floating_dtype, widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import BlockState, packed
from lrkfac.core.curvature.joining import APART
from lrkfac.core.layers.matrix import LayerMatrix, collect, flat, layer_leaves, layer_matrix
from lrkfac.core.linalg.damping import EXACT
from lrkfac.core.linalg.products import STACKABLE

LARGEST = {"cpu": 2**18}
"""Numbers of gradients that are stacked at most, by type of device: beyond, copies take longer than further calls. A
CPU loses by leaving its cache, too: up to 2^18 numbers it gained a quarter, with 2^20 it took twice as long.
"""


LARGEST_ELSEWHERE = 2**22
"""The same of other devices, on which it takes as long to copy 16 MB as to launch a few operations."""


def alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Return groups of blocks that may be joined, in the order of their first; others are groups of one."""
    groups: dict[Hashable, list[Block]] = {}
    for block in blocks:
        layer, joining = block.layers[0], block.structure.joining
        key: Hashable = block.name
        if joining is not APART and layer.groups == 1:
            units = None if joining.any_output else layer.d_out
            key = (block.structure, layer.d_in, layer.bias is None, units)
        groups.setdefault(key, []).append(block)
    return list(groups.values())


def natural_gradients(
    groups: Sequence[Sequence[Block]], states: Mapping[str, BlockState], leaves: list[Any]
) -> dict[int, Any]:
    """Return the natural gradient of each parameter that the blocks cover, by the parameter's index.

    Each is computed in the wider one of its dtype and that of the inverse. It stays a lazy matrix where the gradient is
    one and the block is a product.

    Args:
        groups: From ``alike``.
        states: Of each block by name.
        leaves: The gradients of all parameters.
    """
    natural: dict[int, Any] = {}
    for group in groups:
        inverses = [states[block.name].inverse for block in group]
        gradients = [[_gradient(block, layer, leaves) for layer in block.layers] for block in group]
        for numbers in _stacks(group, inverses, gradients):
            stack, parts = [group[i] for i in numbers], [x for i in numbers for x in gradients[i]]
            layers = [layer for block in stack for layer in block.layers]
            for layer, part in zip(layers, apply(stack[0], [inverses[i] for i in numbers], parts), strict=True):
                collect(natural, layer_leaves(layer, part))
    return natural


def apply(block: Block, inverses: list[Any], gradients: list[LayerMatrix]) -> list[LayerMatrix]:
    """Return natural gradients, in the dtype of the gradients.

    Args:
        block: A block; all others in the call are alike.
        inverses: Of each block.
        gradients: Of each layer: of the block's own layers, or of one layer for each block.
    """
    structure = block.structure
    if structure.joins_layers:
        inverse, row = _widened(inverses[0], LayerMatrix(flat([x.joined() for x in gradients])[None]))
        return _unflat(structure.apply(inverse, row).weight, gradients)
    joining = structure.joining
    inverse, gradient = _widened(joining.inverses(inverses), joining.gradient(gradients))
    grouped = block.layers[0].groups > 1
    natural = _by_group(block, inverse, gradient) if grouped else structure.apply(inverse, gradient)
    return joining.parts(_narrowed(natural, gradients[0]), gradients)


def _gradient(block: Block, layer: Any, leaves: list[Any]) -> LayerMatrix:
    part = layer_matrix(layer, leaves)
    if isinstance(part.weight, LazyMatrix) and not block.structure.keeps_rows:
        return LayerMatrix(part.weight.dense(), part.bias)
    return part


def _stacks(group: Sequence[Block], inverses: list[Any], gradients: list[list[LayerMatrix]]) -> list[list[int]]:
    """Return numbers of blocks that are joined."""
    if len(group) == 1:
        return [[0]]
    any_output = group[0].structure.joining.any_output

    def candidate(inverse: Any, part: LayerMatrix) -> tuple[Any, int, int]:
        weight = part.weight
        lazy = isinstance(weight, LazyMatrix)
        like = weight.left if lazy else weight
        size = weight.left.numel() + weight.right.numel() if lazy else weight.numel()
        key: Any = (type(weight), weight.dtype, like.dtype, like.device, floating_dtype(inverse))
        if not any_output:
            alone = not isinstance(inverse, EXACT) and not all(isinstance(factor, STACKABLE) for factor in inverse)
            key = None if alone else (*key, like.shape, type(inverse), *(type(factor) for factor in inverse))
        return key, size, LARGEST.get(like.device.type, LARGEST_ELSEWHERE)

    return packed([candidate(inverse, *parts) for inverse, parts in zip(inverses, gradients, strict=True)])


def _by_group(block: Block, inverse: Any, gradient: LayerMatrix) -> LayerMatrix:
    """Return the natural gradients of all groups of a layer."""

    def one(inverse: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple([x for x in block.structure.apply(inverse, LayerMatrix(*parts)) if x is not None])

    natural = vmap(one)(inverse, *[x for x in gradient if x is not None])
    return LayerMatrix(*[x.contiguous() for x in natural])


def _unflat(row: Tensor, like: list[LayerMatrix]) -> list[LayerMatrix]:
    """Return the parts of all layers, from all in one row."""
    shapes = [(*x.weight.shape[:-1], x.weight.shape[-1] + (x.bias is not None)) for x in like]
    parts = row.reshape(-1).split([torch.Size(shape).numel() for shape in shapes])
    matrices = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [_narrowed(LayerMatrix.of(m, x.bias is not None), x) for m, x in zip(matrices, like, strict=True)]


def _widened(inverse: Any, gradient: LayerMatrix) -> tuple[Any, LayerMatrix]:
    """Return inverse and gradient in the wider one of their dtypes."""
    weight, bias = gradient
    dtype = floating_dtype(inverse)
    wider = widest(dtype, weight.dtype, dtype if bias is None else bias.dtype)
    if dtype != wider:
        inverse = optree.tree_map(lambda x: x.to(wider), inverse)
    return inverse, LayerMatrix(floating(weight, wider), floating(bias, wider))


def _narrowed(natural: LayerMatrix, like: LayerMatrix) -> LayerMatrix:
    """Return a natural gradient in the dtype of the gradient; the rows of a lazy one in at least float32."""
    weight, bias = natural
    dtype = like.weight.dtype
    if isinstance(weight, LazyMatrix):
        weight = floating(weight, widest(dtype, torch.float32)).to(dtype)
    else:
        weight = weight.to(dtype)
    return LayerMatrix(weight, None if bias is None or like.bias is None else bias.to(like.bias.dtype))
