"""A curvature matrix on parameter trees: one operator for each layer, of the package's or a custom class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating_dtype, wide, widest
from lrkfac.core.base.leaves import tree_structure, tree_unflatten
from lrkfac.core.base.static import Static
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import materialize, vdot
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.matrix import LayerMatrix, collect, layer_leaves, layer_matrix
from lrkfac.core.linalg.damping import inverse


class LayerBlocks(NamedTuple):
    """A symmetric matrix on parameter trees, block diagonal over layers; closed under scaling and inversion.

    ``curvature.from_state`` and ``curvature.estimate`` make it. It is a pytree of tensors. The functions of
    ``lrkfac.linalg`` take it, with trees like the parameters in the place of vectors. It acts on the parameters in its
    blocks. All others, of which ``uncovered`` says the paths, are 0 in every result, and count in no trace, dimension
    or determinant.

    Attributes:
        blocks: The operator of each layer on its weight matrix, row-major, with the column of a joint bias, by name;
            groups and units have leading axes. Under ``""`` where one block holds all layers.
        description: The layers, from ``find_layers``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator="exact")
        >>> fisher = lrkfac.curvature.estimate(evaluate, params, [(x, y)], layers, rank=2)
        >>> fisher.dimension, fisher.product(params)["weight"].shape
        (8, torch.Size([2, 3]))
    """

    blocks: dict[str, Any]
    description: Static[Layers]

    @property
    def layers(self) -> Layers:
        """The layers."""
        return self.description.value

    @property
    def dimension(self) -> int:
        """Number of parameters in the blocks."""
        return sum(layer.groups * layer.d_out * layer.d_in for name in self.blocks for layer in self.members(name))

    @property
    def uncovered(self) -> tuple[str, ...]:
        """The paths of the parameters that are in no block."""
        covered = {i for name in self.blocks for layer in self.members(name) for i in _parameters(layer)}
        return tuple(p.path for p in self.layers.parameters if p.index not in covered)

    def members(self, name: str) -> tuple[Layer, ...]:
        """Return the layers of a block."""
        return (self.layers[name],) if name else tuple(self.layers)

    def of_layers(self, names: Sequence[str]) -> LayerBlocks:
        """Return the blocks of some layers alone, such as the last one; all other parameters are then uncovered.

        Raises:
            ValueError: If there is no block of this name.
        """
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.blocks:
                raise ValueError(f"names: expected layers with blocks, {sorted(self.blocks)}, got {name!r}")
        return self._replace(blocks={name: self.blocks[name] for name in names})

    def product(self, tree: Tree) -> Tree:
        """Return ``M tree``, a tree like the parameters.

        Raises:
            ValueError: If the tree does not fit the parameters.
        """
        return self.on_trees(lambda operator, x: operator.matvec(x), tree)

    def inverse(self, damping: float | Tensor = 0.0, exact: bool = False) -> LayerBlocks:
        """Return ``(M + damping I)⁻¹``; see ``lrkfac.linalg.inverse``, whose errors it passes."""
        return self.mapped(lambda operator: inverse(operator, damping, exact))

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues, ``[]``."""
        return self.summed(lambda operator: operator.trace())

    def quadratic_form(self, tree: Tree) -> Tensor:
        """Return ``treeᵀ M tree``, ``[]``."""
        tree = materialize(tree)
        return vdot(tree, self.product(tree))

    def to_dense(self) -> Tensor:
        """Return the matrix, in the order of the leaves' entries, with rows of zeros for uncovered parameters."""
        sizes = [torch.Size(p.shape).numel() for p in self.layers.parameters]
        dtype, device = floating_dtype(self.blocks), optree.tree_leaves(self.blocks)[0].device
        structure = tree_structure(self.layers.tree)

        def column(row: Tensor) -> Tensor:
            parts = zip(row.split(sizes), self.layers.parameters, strict=True)
            tree = self.product(tree_unflatten(structure, [part.reshape(p.shape) for part, p in parts]))
            return torch.cat([x.reshape(-1) for x in optree.tree_leaves(tree)])

        return vmap(column)(torch.eye(sum(sizes), dtype=dtype, device=device))

    def mapped(self, function: Callable[[Any], Any]) -> LayerBlocks:
        """Return the operators that a function makes of those of all blocks, groups and units."""
        new = {name: over_stack(function, self._axes(name))(operator) for name, operator in self.blocks.items()}
        return self._replace(blocks=new)

    def summed(self, function: Callable[[Any], Tensor]) -> Tensor:
        """Return the sum of a function's numbers over all blocks, groups and units, ``[]``."""
        each = [over_stack(function, self._axes(name))(operator).sum() for name, operator in self.blocks.items()]
        return torch.stack(each).sum()

    def on_trees(self, function: Callable[..., Tensor], *trees: Tree) -> Tree:
        """Return the tree of the vectors that a function makes of each operator and its parts of trees.

        Each part is in the wider one of the dtypes of tree and operator; leaves have those of the first tree, if any.
        """
        every = [check_like(self.layers.tree, materialize(tree), "tree") for tree in trees]
        results: dict[int, Tensor] = {}
        for name, operator in self.blocks.items():
            members = self.members(name)
            rows = [joined_matrices(members, leaves) for leaves in every]
            dtype = widest(floating_dtype(operator), *[row.dtype for row in rows])
            if floating_dtype(operator) != dtype:
                operator = optree.tree_map(lambda x, dtype=dtype: x.to(dtype), operator)
            axes = self._axes(name)
            flat = [row.to(dtype).flatten(axes) for row in rows]
            result = over_stack(function, axes)(operator, *flat)
            for layer, part in zip(members, separate_matrices(members, result), strict=True):
                collect(results, layer_leaves(layer, LayerMatrix.of(part, layer.bias is not None)))
        return self._tree(results, every[0] if every else None)

    def _tree(self, results: dict[int, Tensor], like: list[Tensor] | None) -> Tree:
        """Return a tree of results, zeros where there are none."""
        first = next(iter(results.values())) if results else optree.tree_leaves(self.blocks)[0]
        leaves = []
        for p in self.layers.parameters:
            dtype = like[p.index].dtype if like else first.dtype
            leaves.append(results[p.index].to(dtype) if p.index in results else first.new_zeros(p.shape, dtype=dtype))
        return tree_unflatten(tree_structure(self.layers.tree), leaves)

    def _axes(self, name: str) -> int:
        """Return the number of leading axes of a block's tensors: one for groups, and one for units."""
        return stacked_axes(name, self.members(name), self.blocks[name])


def stacked_axes(name: str, members: Sequence[Layer], operator: Any) -> int:
    """Return the number of leading axes of an operator's tensors.

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
    if operator.dimension not in expected:
        raise ValueError(
            f"blocks: expected an operator of dimension {' or '.join(map(str, expected))} for layer {name!r}, got "
            f"{operator.dimension}; pass the layers of the transformation that made the state"
        )
    return expected[operator.dimension]


def over_stack(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """Return the function mapped over leading axes."""
    for _ in range(axes):
        function = vmap(function)
    return function


def joined_matrices(members: Sequence[Layer], leaves: Sequence[Any]) -> Tensor:
    """Return the matrix of a layer, or those of several in one row."""
    matrices = [layer_matrix(layer, leaves).joined() for layer in members]
    if len(matrices) == 1:
        return matrices[0]
    dtype = widest(*[matrix.dtype for matrix in matrices])
    return torch.cat([wide(matrix).to(dtype).reshape(-1) for matrix in matrices])


def separate_matrices(members: Sequence[Layer], rows: Tensor) -> Iterator[Tensor]:
    """Yield the matrix of each layer, the inverse of ``joined_matrices``."""
    shapes = [torch.Size((layer.groups, layer.d_out, layer.d_in)[layer.groups == 1 :]) for layer in members]
    for shape, part in zip(shapes, rows.reshape(-1).split([shape.numel() for shape in shapes]), strict=True):
        yield part.reshape(shape)


def _parameters(layer: Layer) -> list[int]:
    return [p.index for p in (layer.weight, layer.bias) if p is not None]
