"""Symmetric matrices that are functions or operators, on vectors or on trees, as functions of flat columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.flat import flat_size, flattened, unflattened
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree

SymmetricMap = Any
"""A symmetric matrix: a function, or an operator with ``matvec`` for vectors or ``product`` for trees.

A function of vectors takes ``[d]`` or ``[d, k]``, one of trees a tree.
"""


@dataclass(frozen=True, eq=False)
class Action:
    """A symmetric matrix as a function of flat columns.

    Attributes:
        function: ``x ↦ M x`` for ``[d]`` and ``[d, k]``, or for trees.
        like: The tree that it takes; ``None`` for vectors.
        name: Of the argument, in errors.
    """

    function: Callable[[Any], Any]
    like: Tree | None
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        if self.like is None:
            return self._checked(self.function(x), x)
        if x.ndim == 1:
            image = self.function(unflattened(x, self.like))
            return self._checked(flattened(materialize(image)), x)
        return torch.stack([self(column) for column in x.unbind(1)], dim=1)

    def _checked(self, image: Any, x: Tensor) -> Tensor:
        if not isinstance(image, Tensor) or image.shape != x.shape:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"{self.name}: expected a product of the shape of the vector, {tuple(x.shape)}, got {got}")
        return image.to(x.dtype)


def is_vector(x: Any) -> bool:
    """Return whether ``x`` is a vector ``[d]`` and no other tree."""
    return isinstance(x, Tensor) and x.ndim == 1


def action(operator: SymmetricMap, like: Tree, name: str = "operator") -> Action:
    """Return an operator as a function of flat columns.

    Args:
        operator: A function, or an object with ``matvec`` (for vectors) or ``product`` (for trees).
        like: What it takes: a vector ``[d]`` or a tree.
        name: Of the argument, in errors.

    Raises:
        TypeError: If it is neither.
        ValueError: If its dimension is another one.
    """
    vector = is_vector(like)
    method = getattr(operator, "matvec" if vector else "product", None)
    if not callable(method) and not (callable(operator) and not isinstance(operator, type)):
        raise TypeError(
            f"{name}: expected a function, or an operator with {'matvec' if vector else 'product'}, for "
            f"{'vectors' if vector else 'trees'}, got {type(operator).__name__}"
        )
    dimension = getattr(operator, "dimension", None) if callable(method) else None
    if isinstance(dimension, int) and dimension != flat_size(like):
        raise ValueError(f"{name}: expected one of dimension {flat_size(like)}, as the vector, got {dimension}")
    if not vector and callable(method) and hasattr(operator, "params"):
        # One of lrkfac.curvature, whose flat vectors are in the same order: several columns go through it at once.
        return Action(operator.matvec, None, name)
    return Action(method if callable(method) else operator, None if vector else like, name)


def check_vector(x: Any, name: str) -> Tensor:
    """Return a vector ``[d]`` or tree as a flat vector.

    Raises:
        TypeError: If it is no tree of floating-point tensors.
        ValueError: If it is empty, or on the device "meta".
    """
    if x is None:
        raise TypeError(f"{name}: expected a vector [d] or a tree of tensors, got None")
    leaves = check_tree(x, name)
    if not leaves or not flat_size(x):
        raise ValueError(f"{name}: expected a vector [d] or a tree of tensors with at least one entry, got none")
    if any(leaf.device.type == "meta" for leaf in leaves):
        raise ValueError(f"{name}: expected tensors with values, got one on the device 'meta'")
    return flattened(materialize(x))


def as_columns(x: Any, name: str) -> tuple[Tensor, Tree]:
    """Return several vectors ``[d, k]``, or a tree of stacked leaves ``[k, ...]``, as columns, and one like each.

    Raises:
        TypeError: If it is no tree of floating-point tensors.
        ValueError: If leaves have no common leading axis, or are empty.
    """
    check_vector(x, name)
    if isinstance(x, Tensor) and x.ndim == 2:
        return x, x[:, 0]
    leaves = tree_leaves(x)
    counts = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(counts) > 1 or None in counts or (isinstance(x, Tensor) and x.ndim < 2):
        raise ValueError(
            f"{name}: expected vectors [d, k], or a tree whose leaves have one leading axis of equal length, got the "
            f"shapes {[tuple(leaf.shape) for leaf in leaves]}"
        )
    (count,) = counts
    each = [optree.tree_map(lambda leaf, i=i: leaf[i], x) for i in range(count or 0)]
    return torch.stack([flattened(one) for one in each], dim=1), each[0]


def as_stacked(columns: Tensor, like: Tree) -> Tree:
    """Invert ``as_columns``: return ``[d, k]`` for vectors, and a tree of leaves ``[k, ...]`` for trees."""
    if is_vector(like):
        return columns
    each = [unflattened(column, like) for column in columns.unbind(1)]
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *each)
