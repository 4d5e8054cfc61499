"""Operators of layers on parameter trees: from leaves to the vectors that they act on, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating_dtype, wide, widest
from lrkfac.core.base.leaves import tree_structure, tree_unflatten
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.matrix import LayerMatrix, collect, flat, layer_leaves, layer_matrix

Blocks = Mapping[str, Any]
"""An operator, or a root of one, for each layer by name; under ``""`` where one holds all layers."""


def members(layers: Layers, name: str) -> tuple[Layer, ...]:
    """Return the layers of a block."""
    return (layers[name],) if name else tuple(layers)


def mapped(blocks: Blocks, layers: Layers, function: Callable[[Any], Any]) -> dict[str, Any]:
    """Return what a function makes of the operators of all blocks, groups and units."""
    return {name: over_stack(function, _axes(blocks, layers, name))(one) for name, one in blocks.items()}


def summed(blocks: Blocks, layers: Layers, function: Callable[[Any], Tensor]) -> Tensor:
    """Return the sum of a function's numbers over all blocks, groups and units, ``[]``."""
    return torch.stack([x.sum() for x in mapped(blocks, layers, function).values()]).sum()


def on_trees(blocks: Blocks, layers: Layers, function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Return the tree of the vectors that a function makes of each operator and its parts of trees.

    Each part is in the wider one of the dtypes of tree and operator; leaves have those of the first tree, if any.
    """
    every = [materialize(check_like(layers.tree, tree, "tree")) for tree in trees]
    results: dict[int, Tensor] = {}
    for name, operator in blocks.items():
        inside, axes = members(layers, name), _axes(blocks, layers, name)
        rows = [joined_matrices(inside, leaves) for leaves in every]
        dtype = widest(floating_dtype(operator), *[row.dtype for row in rows])
        result = over_stack(function, axes)(
            in_dtype_of(operator, dtype), *[row.to(dtype).flatten(axes) for row in rows]
        )
        for layer, part in zip(inside, separate_matrices(inside, result), strict=True):
            collect(results, layer_leaves(layer, LayerMatrix.of(part, layer.bias is not None)))
    first = next(iter(results.values())) if results else optree.tree_leaves(every)[0]
    leaves = []
    for p in layers.parameters:
        leaf = results[p.index] if p.index in results else first.new_zeros(p.shape)
        leaves.append(leaf.to(every[0][p.index].dtype) if every else leaf)
    return tree_unflatten(tree_structure(layers.tree), leaves)


def in_dtype_of(operator: Any, dtype: torch.dtype) -> Any:
    """Return an operator with tensors of a dtype."""
    return operator if floating_dtype(operator) == dtype else optree.tree_map(lambda x: x.to(dtype), operator)


def _axes(blocks: Blocks, layers: Layers, name: str) -> int:
    return stacked_axes(name, members(layers, name), blocks[name])


def stacked_axes(name: str, members: Sequence[Layer], operator: Any) -> int:
    """Return the number of leading axes of the tensors of an operator, or a root: one for groups, and one for units.

    Raises:
        ValueError: If the operator has another dimension than the layer, or one unit of it.
    """
    if not name:
        whole = sum(layer.groups * layer.d_out * layer.d_in for layer in members)
        expected = {whole: 0}
    else:
        (layer,) = members
        groups = int(layer.groups > 1)
        expected = {layer.d_in: groups + 1, layer.d_out * layer.d_in: groups}
    dimension = operator.dimension if hasattr(operator, "dimension") else operator.shape[0]
    if dimension not in expected:
        raise ValueError(
            f"blocks: expected an operator of dimension {' or '.join(map(str, expected))} for layer {name!r}, got "
            f"{dimension}; pass the layers of the transformation that made the state"
        )
    return expected[dimension]


def over_stack(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """Return the function mapped over leading axes."""
    for _ in range(axes):
        function = vmap(function)
    return function


def joined_matrices(members: Sequence[Layer], leaves: Sequence[Any]) -> Tensor:
    """Return the matrix of a layer, or those of several in one row."""
    matrices = [layer_matrix(layer, leaves).joined() for layer in members]
    return matrices[0] if len(matrices) == 1 else flat([wide(matrix) for matrix in matrices])


def separate_matrices(members: Sequence[Layer], rows: Tensor) -> Iterator[Tensor]:
    """Yield the matrix of each layer, the inverse of ``joined_matrices``."""
    shapes = [torch.Size((layer.groups, layer.d_out, layer.d_in)[layer.groups == 1 :]) for layer in members]
    for shape, part in zip(shapes, rows.reshape(-1).split([shape.numel() for shape in shapes]), strict=True):
        yield part.reshape(shape)
