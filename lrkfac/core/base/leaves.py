"""Leaves of trees in the order of ``optree``, at a price that the compiler can pay.

It follows ``optree`` through a copy in Python that makes several objects for each node, which took most of the time in
which a step is traced. Here it meets a few lines for the containers that trees of parameters and states consist of,
and ``optree`` itself for all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.types import Tree

LEAVES = Tensor, LazyMatrix, bool, int, float, str
"""Types of most leaves, which are told from containers without a look into the registry."""


def tree_leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree, as ``optree.tree_leaves`` does."""
    if not torch.compiler.is_compiling():
        return optree.tree_leaves(tree)
    found: list[Any] = []
    _append_leaves(found, tree)
    return found


def tree_flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, and its structure for ``tree_unflatten`` and ``same_structure``."""
    return (tree_leaves(tree), tree) if torch.compiler.is_compiling() else optree.tree_flatten(tree)


def tree_structure(tree: Tree) -> Any:
    """Return the structure of a tree; under the compiler, any tree of it."""
    return tree if torch.compiler.is_compiling() else optree.tree_structure(tree)


def tree_unflatten(structure: Any, leaves: Iterable[Any]) -> Any:
    """Return a tree of a structure, which comes from the same call: eager and compiled structures differ."""
    return (
        _filled(structure, iter(leaves)) if torch.compiler.is_compiling() else optree.tree_unflatten(structure, leaves)
    )


def leaves_like(structure: Any, tree: Tree) -> list[Any]:
    """Return the leaves of a tree of a structure, in its order."""
    if not torch.compiler.is_compiling():
        return structure.flatten_up_to(tree)
    return tree_leaves(tree) if _same(structure, tree) else optree.tree_structure(structure).flatten_up_to(tree)


def same_structure(x: Any, y: Any) -> bool:
    """Return whether structures are equal; under the compiler, ``False`` also of unusual containers."""
    return _same(x, y) if torch.compiler.is_compiling() else x == y


def _append_leaves(found: list[Any], tree: Tree) -> None:
    if _is_leaf(tree):
        found.append(tree)
        return
    children = _children(tree)
    for child in optree.tree_leaves(tree) if children is None else children:
        if isinstance(child, LEAVES):
            found.append(child)
        else:
            _append_leaves(found, child)


def _children(node: Any) -> list[Any] | None:
    """Return the children of a container, ``None`` of an unusual one."""
    if node is None:
        return []
    if type(node) is dict:
        names = _ordered(node)
        return None if names is None else [node[name] for name in names]
    return list(node) if _is_sequence(node) else None


def _ordered(node: dict[Any, Any]) -> list[Any] | None:
    """Return the keys of a dictionary as ``optree`` sorts them, ``None`` where they are not all strings."""
    return sorted(node) if all([isinstance(name, str) for name in node]) else None


def _is_leaf(x: Any) -> bool:
    return isinstance(x, LEAVES) or not (type(x) is dict or x is None or _is_sequence(x) or not optree.tree_is_leaf(x))


def _is_sequence(node: Any) -> bool:
    return type(node) in (list, tuple) or (isinstance(node, tuple) and hasattr(node, "_fields"))


def _filled(like: Tree, leaves: Iterator[Any]) -> Any:
    """Return a tree with the next leaves in the place of its own."""
    if _is_leaf(like):
        return next(leaves)
    if like is None:
        return None
    if type(like) is dict and (names := _ordered(like)) is not None:
        filled = {name: _filled(like[name], leaves) for name in names}
        return {name: filled[name] for name in like}
    if _is_sequence(like):
        parts = [_filled(part, leaves) for part in like]
        return parts if type(like) is list else tuple(parts) if type(like) is tuple else type(like)(*parts)
    return optree.tree_unflatten(optree.tree_structure(like), [next(leaves) for _ in optree.tree_leaves(like)])


def _same(x: Tree, y: Tree) -> bool:
    if isinstance(x, LEAVES) or isinstance(y, LEAVES):
        return _is_leaf(x) and _is_leaf(y)
    if type(x) is not type(y):
        return False
    if type(x) is dict:
        return x.keys() == y.keys() and all([_same(part, y[name]) for name, part in x.items()])
    if not _is_sequence(x):
        return x is None
    return len(x) == len(y) and all([_same(*pair) for pair in zip(x, y, strict=True)])
