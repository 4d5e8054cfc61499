"""Checks of trees: structure, shapes, dtypes and devices of leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.leaves import same_structure, tree_flatten, tree_leaves, tree_structure
from lrkfac.core.base.sharding import is_sharded
from lrkfac.core.base.summand import Summand
from lrkfac.core.base.types import Tree


def paths(x: Tree) -> tuple[str, ...]:
    """Return the dotted path of every leaf, in the order of ``optree.tree_leaves``."""
    return tuple(".".join(str(_key(entry)) for entry in accessor) for accessor in optree.tree_accessors(x))


def paths_with_none(x: Tree) -> tuple[str, ...]:
    """Return the dotted path of every leaf and every ``None``."""
    accessors = optree.tree_accessors(x, none_is_leaf=True)
    return tuple(".".join(str(_key(entry)) for entry in accessor) for accessor in accessors)


def _key(entry: optree.PyTreeEntry) -> Any:
    return entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry


def difference(expected: Tree, got: Tree) -> str | None:
    """Describe in words how the structure of ``got`` differs from that of ``expected``; ``None`` if it does not.

    For messages such as ``f"expected ..., got {difference(expected, got)}"``.
    """
    if same_structure(tree_structure(expected), tree_structure(got)):
        return None
    expected_paths, got_paths = paths(expected), paths(got)
    if torch.compiler.is_compiling() and expected_paths == got_paths:  # the compiler cannot compare all structures
        return None
    if "" in (*expected_paths, *got_paths):  # the path of a single leaf
        return f"{_entries(got, got_paths)} in place of {_entries(expected, expected_paths)}"
    missing = [path for path in expected_paths if path not in got_paths]
    unexpected = [path for path in got_paths if path not in expected_paths]
    return f"missing {missing}, unexpected {unexpected}" if missing or unexpected else f"{optree.tree_structure(got)}"


def _entries(tree: Tree, leaf_paths: tuple[str, ...]) -> str:
    if leaf_paths != ("",):
        return f"the entries {list(leaf_paths)}"
    return "one tensor" if isinstance(tree, Tensor | LazyMatrix) else "one value"


def check_like(expected: Tree, got: Tree, what: str) -> list[Tensor]:
    """Return the leaves of a tree; raise unless it has the structure and shapes of another.

    Raises:
        ValueError: Names the leaf that is missing, unexpected, of another shape or on another device, or is no
            floating-point tensor.
        TypeError: If a leaf is a ``DTensor``.
    """
    leaves, structure = tree_flatten(got)
    likes, expected_structure = tree_flatten(expected)
    differs = None if same_structure(expected_structure, structure) else difference(expected, got)
    if differs is not None:
        raise ValueError(
            f"{what}: the tree differs from the one at the start: {differs}; pass a tree like the parameters, "
            "or call find_layers() and init() again for others"
        )
    _check_places(got, leaves, what)
    for i, (leaf, like) in enumerate(zip(leaves, likes, strict=True)):
        if not isinstance(leaf, Tensor | LazyMatrix) or leaf.shape != like.shape:
            actual = tuple(leaf.shape) if isinstance(leaf, Tensor | LazyMatrix) else type(leaf).__name__
            has_members = isinstance(leaf, Tensor) and leaf.shape[1:] == like.shape
            members = "; for a leading axis of members, map the call, as in vmap(tx.init)(params)"
            raise ValueError(
                f"{what}: expected {paths(expected)[i]!r} of shape {tuple(like.shape)}, got {actual}; pass a "
                f"tree like the parameters, or call find_layers() and init() again for others{members * has_members}"
            )
        device = like.device if isinstance(like, Tensor) else leaf.device
        if not leaf.dtype.is_floating_point or leaf.device != device:
            raise ValueError(
                f"{what}: expected {paths(expected)[i]!r} to be floating-point numbers on {device}, got {leaf.dtype} "
                f"on {leaf.device}"
            )
    return leaves


def check_stacked(expected: Tree, got: Tree, what: str) -> None:
    """Raise unless a tree is like another with one more axis in front of each leaf, of equal length.

    Raises:
        ValueError: As ``check_like``.
    """
    leaves = tree_leaves(got)
    count = leaves[0].shape[:1] if leaves and isinstance(leaves[0], Tensor) else torch.Size([0])
    check_like(optree.tree_map(lambda x: x.expand(*count, *x.shape), expected), got, what)


def check_tree(got: Tree, what: str) -> list[Tensor]:
    """Return the leaves of a tree; raise unless they are floating-point tensors.

    Raises:
        TypeError: Names the leaf that is something else.
        ValueError: If some are on the device "meta".
    """
    leaves: list[Tensor] = tree_leaves(got)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor | LazyMatrix) or not leaf.dtype.is_floating_point:
            actual = leaf.dtype if isinstance(leaf, Tensor | LazyMatrix) else type(leaf).__name__
            raise TypeError(f"{what}: expected floating-point tensors, got {actual} at {paths(got)[i]!r}")
    if got is None:
        raise TypeError(f"{what}: expected a tree of tensors, got None")
    _check_places(got, leaves, what)
    return leaves


def check_whole(tree: Tree, leaves: Sequence[Any], what: str) -> None:
    """Raise ``TypeError`` if a leaf is a ``DTensor`` or a ``Summand``, with its path in the tree."""
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Summand):
            raise TypeError(
                f"{what}: expected whole gradients, got one process' part at {paths(tree)[i]!r}, as "
                "evaluator(..., scatter=True) leaves them; put precondition_by_fisher(layers, owners=group) first, or "
                "pass lrkfac.materialize() of them, which sums them"
            )
        if is_sharded(leaf):
            parts = f"{tuple(leaf.placements)} over {leaf.device_mesh.size()} processes"
            place = f" at {paths(tree)[i]!r}" if tree is not leaf else ""
            raise TypeError(
                f"{what}: expected whole tensors, got a DTensor {parts}{place}; pass lrkfac.unshard() of it; "
                "a model whose layers compute with DTensors (tensor parallelism) is not taken"
            )


def _check_places(tree: Tree, leaves: list[Any], what: str) -> None:
    """Raise if a leaf is sharded, or some leaves have values and some not; a tree without any asks for shapes."""
    check_whole(tree, leaves, what)
    if len({leaf.device.type == "meta" for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
        raise ValueError(f"{what}: expected tensors with values, got some on the device 'meta'")
