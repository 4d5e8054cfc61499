"""Natural gradients of all blocks; those of equal form are made in one batched call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.dtypes import floating, floating_dtype, widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.trees import materialize
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import apply, packed
from lrkfac.core.curvature.exact import BlockStructure
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.curvature.structures import Structure
from lrkfac.core.layers.description import Layer
from lrkfac.core.layers.matrix import collect, from_matrices, to_matrix, turned
from lrkfac.core.layers.views import apply_view, scatter_view
from lrkfac.core.linalg.operators import Kronecker
from lrkfac.core.linalg.products import STACKABLE, of_rows, two_sided

LARGEST = {"cpu": 2**18}
"""Numbers of gradients that are stacked at most, by type of device: beyond, copies take longer than further calls. A
CPU loses by leaving its cache, too: up to 2^18 numbers it gained a quarter, with 2^20 it took twice as long.
"""


LARGEST_ELSEWHERE = 2**22
"""The same of other devices, on which it takes as long to copy 16 MB as to launch a few operations."""


class Part(NamedTuple):
    """A layer's gradient: that of its weight, ``[d_out, d_in]`` or held by its rows, and that of a joint bias apart."""

    weight: Any
    bias: Tensor | None


def alike(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks with equal structure and sizes, in the order of their first; those that are applied alone by themselves.

    Blocks for each unit of a layer may differ in the number of units.
    """
    found: dict[Any, list[Block]] = {}
    for block in blocks:
        layer = block.layers[0]
        form: Any = block.name
        if in_parts(block):
            sizes = (layer.d_in, layer.bias is None)
            of_units = isinstance(block.structure, BlockStructure)
            form = (block.structure, *sizes, None if of_units else layer.d_out)
        found.setdefault(form, []).append(block)
    return list(found.values())


def in_parts(block: Block) -> bool:
    """Whether weight and bias of a block are taken apart: of products, and of blocks for each unit of one layer."""
    of_units = isinstance(block.structure, BlockStructure) and block.structure.per == "unit"
    return block.layers[0].groups == 1 and (of_units or isinstance(block.structure, KroneckerStructure))


def natural_gradients(groups: Sequence[Sequence[Block]], inverses: dict[str, Any], leaves: list[Any]) -> dict[int, Any]:
    """From a parameter's index to its natural gradient, of all parameters that the blocks cover.

    Each is computed in the wider one of its dtype and that of the inverse, and held by its rows where the gradient is
    and the block is a product.

    Args:
        groups: From ``alike``.
        inverses: Of each block by name.
        leaves: The gradients of all parameters.
    """
    found: dict[int, Any] = {}
    for group in groups:
        if not in_parts(group[0]):
            for block in group:
                matrices = apply(block, inverses[block.name], [to_matrix(layer, leaves) for layer in block.layers])
                collect(found, from_matrices(list(block.layers), matrices))
            continue
        layers = [block.layers[0] for block in group]
        parts = [part_of(layer, leaves) for layer in layers]
        for numbers in _together(group, inverses, parts):
            chosen = [parts[i] for i in numbers]
            operators = [inverses[group[i].name] for i in numbers]
            of_group = _of_units if isinstance(group[0].structure, BlockStructure) else _of_products
            for i, part in zip(numbers, of_group(group[0].structure, operators, chosen), strict=True):
                collect(found, _leaves_of(layers[i], part))
    return found


def part_of(layer: Layer, leaves: list[Any]) -> Part:
    """A layer's part of the gradients."""
    weight = leaves[layer.weight.index]
    if isinstance(weight, LazyMatrix) and weight.terms:
        weight = weight.dense()
    if isinstance(weight, LazyMatrix):
        weight = turned(layer, weight)
    else:
        weight = apply_view(layer.weight.view, weight).reshape(layer.d_out, -1)
    bias = None if layer.bias is None else apply_view(layer.bias.view, leaves[layer.bias.index]).reshape(-1)
    return Part(weight, bias)


def of_product(inverse: Kronecker, part: Part) -> Part:
    """That of a block that is a product, in the dtype of both; or of several, stacked along a leading axis."""
    if not isinstance(part.weight, LazyMatrix):
        return Part(*two_sided(inverse, *part))
    left, _ = of_rows(inverse.output, part.weight.left, None)
    if part.bias is None:
        return Part(LazyMatrix(left, inverse.input.of_rows(part.weight.right), part.weight.dtype), None)
    right, ones = of_rows(inverse.input, part.weight.right, left.new_ones(()))
    assert ones is not None
    return Part(LazyMatrix(left, right, part.weight.dtype), (ones[..., None, :] @ left).squeeze(-2))


def _together(group: Sequence[Block], inverses: dict[str, Any], parts: list[Part]) -> list[list[int]]:
    """Numbers of blocks that are stacked, in lists."""
    if len(group) == 1:
        return [[0]]
    of_products = isinstance(group[0].structure, KroneckerStructure)

    def wanted(block: Block, part: Part) -> tuple[Any, int, int]:
        weight, inverse = part.weight, inverses[block.name]
        like = weight.left if isinstance(weight, LazyMatrix) else weight
        size = weight.left.numel() + weight.right.numel() if isinstance(weight, LazyMatrix) else weight.numel()
        form: Any = (type(weight), weight.dtype, like.dtype, like.device, floating_dtype(inverse))
        if of_products:
            alone = not all(isinstance(factor, STACKABLE) for factor in inverse)
            form = None if alone else (*form, like.shape, *(type(factor) for factor in inverse))
        return form, size, LARGEST.get(like.device.type, LARGEST_ELSEWHERE)

    return packed([wanted(*pair) for pair in zip(group, parts, strict=True)])


def _of_products(structure: Structure, inverses: list[Any], parts: list[Part]) -> list[Part]:
    first, alone = parts[0], len(parts) == 1
    inverse = inverses[0] if alone else optree.tree_map(lambda *x: torch.stack(x), *inverses)
    whole = first if alone else Part(_stacked([part.weight for part in parts]), _joined(parts, torch.stack))
    inverse, whole = _widened(inverse, whole)
    natural = of_product(inverse, whole)
    weight: Any
    if isinstance(natural.weight, LazyMatrix):
        weight = floating(natural.weight, widest(first.weight.dtype, torch.float32))
        rows = [(weight.left, weight.right)] if alone else zip(weight.left.unbind(), weight.right.unbind(), strict=True)
        weights: list[Any] = [LazyMatrix(left, right, first.weight.dtype) for left, right in rows]
    else:
        weight = natural.weight.to(first.weight.dtype)
        weights = [weight] if alone else list(weight.unbind())
    if natural.bias is None or first.bias is None:
        return [Part(weight, None) for weight in weights]
    bias = natural.bias.to(first.bias.dtype)
    return [Part(*pair) for pair in zip(weights, [bias] if alone else bias.unbind(), strict=True)]


def _of_units(structure: Structure, inverses: list[Any], parts: list[Part]) -> list[Part]:
    """One after another along the axis of units."""
    first = parts[0]
    inverse = inverses[0] if len(parts) == 1 else optree.tree_map(lambda *x: torch.cat(x), *inverses)
    weights = [materialize(part.weight) for part in parts]
    inverse, (weight, bias) = _widened(inverse, Part(torch.cat(weights), _joined(parts, torch.cat)))
    matrix = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    natural, sizes = structure.apply(inverse, matrix), [weight.shape[0] for weight in weights]
    if bias is None or first.bias is None:
        return [Part(weight, None) for weight in natural.to(weights[0].dtype).split(sizes)]
    both = natural[:, :-1].to(weights[0].dtype).split(sizes), natural[:, -1].to(first.bias.dtype).split(sizes)
    return [Part(*pair) for pair in zip(*both, strict=True)]


def _stacked(weights: list[Any]) -> Any:
    if not isinstance(weights[0], LazyMatrix):
        return torch.stack(weights)
    left, right = (torch.stack([getattr(weight, side) for weight in weights]) for side in ("left", "right"))
    return LazyMatrix(left, right, weights[0].dtype)


def _joined(parts: list[Part], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    biases = [part.bias for part in parts if part.bias is not None]
    return join(biases) if biases else None


def _widened(inverse: Any, part: Part) -> tuple[Any, Part]:
    """Both in the wider one of their dtypes."""
    held = floating_dtype(inverse)
    wider = widest(held, part.weight.dtype, held if part.bias is None else part.bias.dtype)
    if held != wider:
        inverse = optree.tree_map(lambda x: x.to(wider), inverse)
    return inverse, Part(floating(part.weight, wider), floating(part.bias, wider))


def _leaves_of(layer: Layer, part: Part) -> dict[int, Any]:
    """From a parameter's index to the leaf that a layer's part makes up."""
    if isinstance(part.weight, LazyMatrix):
        found: dict[int, Any] = {layer.weight.index: turned(layer, part.weight)}
    else:
        found = {layer.weight.index: scatter_view(layer.weight.view, layer.weight.shape, part.weight)}
    if layer.bias is not None and part.bias is not None:
        bias = scatter_view(layer.bias.view, layer.bias.shape, part.bias)
        collect(found, {layer.bias.index: bias})
    return found
