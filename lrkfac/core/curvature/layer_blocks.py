"""A curvature matrix on parameter trees: one operator for each layer, of the package's or a custom class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating_dtype
from lrkfac.core.base.flat import flattened
from lrkfac.core.base.leaves import tree_structure, tree_unflatten
from lrkfac.core.base.static import Static
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import materialize, vdot
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.block_trees import mapped, members, on_trees, summed
from lrkfac.core.layers.description import Layers
from lrkfac.core.linalg.damping import damped, inverse
from lrkfac.core.linalg.determinants import logdet
from lrkfac.core.linalg.entries import diagonal, scale
from lrkfac.core.linalg.square_roots import inverse_root, root


class LayerBlocks(NamedTuple):
    """A symmetric matrix on parameter trees, block diagonal over layers; closed under damping, scaling and inversion.

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
        inside = [layer for name in self.blocks for layer in members(self.layers, name)]
        return sum(layer.groups * layer.d_out * layer.d_in for layer in inside)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """The paths of the parameters that are in no block."""
        inside = [layer for name in self.blocks for layer in members(self.layers, name)]
        covered = {p.index for layer in inside for p in (layer.weight, layer.bias) if p is not None}
        return tuple(p.path for p in self.layers.parameters if p.index not in covered)

    def of_layers(self, names: Sequence[str]) -> LayerBlocks:
        """Return the blocks of some layers alone, such as the last one; all other parameters are then uncovered.

        Raises:
            ValueError: If there is no block of this name, or no name.
            TypeError: If ``names`` is no list or tuple of names.
        """
        if not isinstance(names, list | tuple):
            raise TypeError(f"names: expected a list or tuple of names of layers, got {type(names).__name__}")
        for name in names or [None]:
            if name not in list(self.blocks):
                raise ValueError(f"names: expected some of the layers with blocks, {sorted(self.blocks)}, got {name!r}")
        return self._replace(blocks={name: self.blocks[name] for name in names})

    def product(self, tree: Tree) -> Tree:
        """Return ``M tree``, a tree like the parameters.

        Raises:
            ValueError: If the tree does not fit the parameters.
        """
        return on_trees(self.blocks, self.layers, lambda operator, x: operator.matvec(x), tree)

    def matvec(self, tree: Tree) -> Tree:
        """Return ``M tree``; the same as ``product``, since a tree is the vector."""
        return self.product(tree)

    def inverse(self, damping: float | Tensor = 0.0, exact: bool = False) -> LayerBlocks:
        """Return ``(M + damping I)⁻¹``; see ``lrkfac.linalg.inverse``.

        Raises:
            ValueError: If ``damping`` is a negative or non-finite number.
            TypeError: If it is no number, or a block has no exactly damped inverse.
        """
        return self._each(lambda operator: inverse(operator, damping, exact))

    def damped(self, damping: float | Tensor, exact: bool = True) -> LayerBlocks:
        """Return ``M + damping I``; see ``lrkfac.linalg.damped``.

        Raises:
            ValueError: If ``damping`` is a negative or non-finite number.
            TypeError: If it is no number, or a block cannot be damped exactly.
        """
        return self._each(lambda operator: damped(operator, damping, exact))

    def scale(self, c: float | Tensor) -> LayerBlocks:
        """Return ``c M``; see ``lrkfac.linalg.scale``.

        Raises:
            ValueError: If ``c`` is not finite.
            TypeError: If it is no number.
        """
        return self._each(lambda operator: scale(operator, c))

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues, ``[]``."""
        return summed(self.blocks, self.layers, lambda operator: operator.trace())

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant, ``[]``, over the parameters in blocks.

        Raises:
            ValueError: If a block is indefinite or singular, where values are known.
        """
        return summed(self.blocks, self.layers, logdet)

    def diagonal(self) -> Tree:
        """Return the diagonal, a tree like the parameters."""
        return on_trees(self.blocks, self.layers, diagonal)

    def root(self) -> LayerRoots:
        """Return ``S`` with ``S Sᵀ = M`` on trees.

        Raises:
            ValueError: If a block is indefinite or singular, where values are known.
        """
        return LayerRoots(mapped(self.blocks, self.layers, root), self.description)

    def inverse_root(self) -> LayerRoots:
        """Return ``S`` with ``S Sᵀ = M⁻¹`` on trees.

        Raises:
            ValueError: If a block is indefinite or singular, where values are known.
        """
        return LayerRoots(mapped(self.blocks, self.layers, inverse_root), self.description)

    def sample(self, noise: Tree) -> Tree:
        """Return a draw of ``N(0, M)`` from standard normal numbers, a tree like the parameters.

        Raises:
            ValueError: If the tree does not fit the parameters, or a block is indefinite or singular.
        """
        check_like(self.layers.tree, noise, "noise")
        return self.root().matvec(noise)

    def solve(self, tree: Tree) -> Tree:
        """Return ``M⁻¹ tree``.

        Raises:
            ValueError: If the tree does not fit the parameters, or a block is indefinite or singular.
        """
        half = self.inverse_root()
        return half.matvec(half.rmatvec(tree))

    def quadratic_form(self, tree: Tree) -> Tensor:
        """Return ``treeᵀ M tree``, ``[]``.

        Raises:
            ValueError: If the tree does not fit the parameters.
        """
        product = self.product(tree)
        return vdot(materialize(tree), product)

    def to_dense(self) -> Tensor:
        """Return the matrix, in the order of the leaves' entries, with rows of zeros for uncovered parameters."""
        sizes = [torch.Size(p.shape).numel() for p in self.layers.parameters]
        dtype, device = floating_dtype(self.blocks), optree.tree_leaves(self.blocks)[0].device
        structure = tree_structure(self.layers.tree)

        def column(row: Tensor) -> Tensor:
            parts = zip(row.split(sizes), self.layers.parameters, strict=True)
            tree = self.product(tree_unflatten(structure, [part.reshape(p.shape) for part, p in parts]))
            return flattened(tree)

        return vmap(column)(torch.eye(sum(sizes), dtype=dtype, device=device))

    def _each(self, function: Callable[[Any], Any]) -> LayerBlocks:
        return self._replace(blocks=mapped(self.blocks, self.layers, function))


class LayerRoots(NamedTuple):
    """A root ``S`` of a curvature matrix on parameter trees, block by block.

    Attributes:
        blocks: The root of each layer's operator, by name.
        description: The layers.
    """

    blocks: dict[str, Any]
    description: Static[Layers]

    def matvec(self, tree: Tree) -> Tree:
        """Return ``S tree``, a tree like the parameters; 0 for those that are in no block."""
        return on_trees(self.blocks, self.description.value, lambda one, x: one.matvec(x), tree)

    def rmatvec(self, tree: Tree) -> Tree:
        """Return ``Sᵀ tree``."""
        return on_trees(self.blocks, self.description.value, lambda one, x: one.rmatvec(x), tree)
