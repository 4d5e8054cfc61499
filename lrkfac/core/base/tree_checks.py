"""Checks of trees: structure, shapes, dtypes and devices."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.types import Tree


def paths(x: Tree) -> tuple[str, ...]:
    """The dotted path of every leaf, in the order of ``optree.tree_leaves``."""
    return tuple(".".join(str(_key(entry)) for entry in accessor) for accessor in optree.tree_accessors(x))


def _key(entry: optree.PyTreeEntry) -> Any:
    return entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry


def difference(expected: Tree, got: Tree) -> str | None:
    """In what the structure of a tree differs from that of another, in words; ``None`` where it does not."""
    # The compiler cannot compare structures; paths, which it can, take too long for every eager step.
    compiling = torch.compiler.is_compiling()
    if paths(got) == paths(expected) if compiling else optree.tree_structure(got) == optree.tree_structure(expected):
        return None
    wanted, there = paths(expected), paths(got)
    missing = [path for path in wanted if path not in there]
    unexpected = [path for path in there if path not in wanted]
    return f"missing {missing}, unexpected {unexpected}" if missing or unexpected else f"{optree.tree_structure(got)}"


def check_like(expected: Tree, got: Tree, what: str) -> list[Tensor]:
    """The leaves of a tree, which is refused unless it has the structure and shapes of another.

    Raises:
        ValueError: Names the leaf that is missing, unexpected, of another shape or on another device, or is no
            floating-point tensor.
    """
    leaves, structure = optree.tree_flatten(got)
    likes, wanted = optree.tree_flatten(expected)
    same = not torch.compiler.is_compiling() and structure == wanted
    differs = None if same else difference(expected, got)
    if differs is not None:
        raise ValueError(
            f"{what}: the tree differs from the one at the start: {differs}; pass a tree like the parameters, "
            "or call find_layers() and init() again for others"
        )
    _check_devices(leaves, what)
    for i, (leaf, like) in enumerate(zip(leaves, likes, strict=True)):
        if not isinstance(leaf, Tensor | LazyMatrix) or leaf.shape != like.shape:
            there_is = tuple(leaf.shape) if isinstance(leaf, Tensor | LazyMatrix) else type(leaf).__name__
            raise ValueError(
                f"{what}: expected {paths(expected)[i]!r} of shape {tuple(like.shape)}, got {there_is}; pass a "
                "tree like the parameters, or call find_layers() and init() again for others"
            )
        device = like.device if isinstance(like, Tensor) else leaf.device
        if not leaf.dtype.is_floating_point or leaf.device != device:
            raise ValueError(
                f"{what}: expected {paths(expected)[i]!r} to be floating-point numbers on {device}, got {leaf.dtype} "
                f"on {leaf.device}"
            )
    return leaves


def check_stacked(expected: Tree, got: Tree, what: str) -> None:
    """Refuses a tree that is not one like another with one more axis of equal length in front of each leaf.

    Raises:
        ValueError: As ``check_like``.
    """
    leaves = optree.tree_leaves(got)
    count = leaves[0].shape[:1] if leaves and isinstance(leaves[0], Tensor) else torch.Size([0])
    check_like(optree.tree_map(lambda x: x.expand(*count, *x.shape), expected), got, what)


def check_tree(got: Tree, what: str) -> list[Tensor]:
    """The leaves of a tree, which is refused unless they are floating-point tensors.

    Raises:
        TypeError: Names the leaf that is something else.
        ValueError: If some are on the device "meta".
    """
    leaves: list[Tensor] = optree.tree_leaves(got)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor | LazyMatrix) or not leaf.dtype.is_floating_point:
            there_is = leaf.dtype if isinstance(leaf, Tensor | LazyMatrix) else type(leaf).__name__
            raise TypeError(f"{what}: expected floating-point tensors, got {there_is} at {paths(got)[i]!r}")
    if got is None:
        raise TypeError(f"{what}: expected a tree of tensors, got None")
    _check_devices(leaves, what)
    return leaves


def _check_devices(leaves: list[Any], what: str) -> None:
    """Of tensors without values there are none or all, as where nothing but shapes is asked for."""
    if len({leaf.device.type == "meta" for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
        raise ValueError(f"{what}: expected tensors with values, got some on the device 'meta'")
