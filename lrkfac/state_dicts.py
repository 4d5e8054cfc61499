"""Trees as flat dictionaries, which anything can save, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_values
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree

Plain = bool | int | float | str
"""What a leaf may be apart from a tensor."""


def state_dict(tree: Tree) -> dict[str, Any]:
    """A tree as a flat dictionary from dotted paths to copies of its leaves.

    ``torch.save(state_dict(state), file)`` needs no class of lrkfac to be read, so ``torch.load(file,
    weights_only=True)`` does it; ``torch.distributed.checkpoint`` saves it, and loads into that of a fresh state.
    ``from_state_dict`` is the way back.

    Args:
        tree: Such as a state, or parameters. Leaves are tensors, numbers, or strings.

    Raises:
        TypeError: If a leaf is something else; names it.
    """
    return {name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for name, leaf in named(tree)}


def from_state_dict(like: Tree, state_dict: Mapping[str, Any]) -> Tree:
    """The tree with the structure of another and the leaves of a dictionary, on the devices of the other's.

    Args:
        like: Such as ``tx.init(params)``; its values do not matter.
        state_dict: From ``state_dict`` of a tree of this structure, in any order.

    Raises:
        ValueError: If a leaf is missing, unexpected, or has another shape or dtype, or no values; names it.
        TypeError: If ``state_dict`` is no mapping, or a leaf no tensor or number.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected what state_dict(tree) returned, got {type(state_dict).__name__}")
    expected = dict(named(like, "like"))
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"state_dict: it differs from like: missing {missing}, unexpected {unexpected}; pass a tree like the "
            "one that was saved, made by the same transformation for the same layers"
        )
    leaves = []
    for name, leaf in expected.items():
        value = state_dict[name]
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            check_values(state_dict=value)
        if form(value) != form(leaf):
            raise ValueError(
                f"state_dict: expected {name!r} to be {form(leaf)}, got {form(value)}; pass a tree like the one that "
                "was saved, made by the same transformation for the same layers"
            )
        leaves.append(value.to(leaf.device) if isinstance(leaf, Tensor) else value)
    return optree.tree_unflatten(optree.tree_structure(like), leaves)


def carried_over(new: Any, old: Any) -> Any:
    """A state with what another has of it: what stands under a name, such as a layer's, as a whole or not at all."""
    if _alike(new, old):
        return old
    if isinstance(new, dict) and isinstance(old, dict):
        known = [name for name, x in new.items() if name in old and (_has_names(x) or _alike(x, old[name]))]
        return {**new, **{name: carried_over(new[name], old[name]) for name in known}}
    if isinstance(new, tuple) and type(new) is type(old) and len(new) == len(old):
        parts = [carried_over(x, y) for x, y in zip(new, old, strict=True)]
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    return new


def _alike(new: Tree, old: Tree) -> bool:
    found, there = ([form(x) for x in optree.tree_leaves(tree)] for tree in (new, old))
    return found == there and optree.tree_structure(new) == optree.tree_structure(old)


def _has_names(state: Any) -> bool:
    return isinstance(state, dict) or (isinstance(state, tuple) and any(_has_names(part) for part in state))


def named(tree: Tree, what: str = "tree") -> list[tuple[str, Any]]:
    """Each leaf with its name: its dotted path, and its number where an earlier leaf has the same.

    Raises:
        TypeError: If a leaf is neither tensor, number nor string.
    """
    found: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(zip(paths(tree), optree.tree_leaves(tree), strict=True)):
        if not isinstance(leaf, Tensor | Plain):
            raise TypeError(
                f"{what}: expected {path!r} to be a tensor, a number or a string, got {type(leaf).__name__}"
            )
        while path in found:
            path += f"#{i}"
        found[path] = leaf
    return list(found.items())


def form(leaf: Any) -> str:
    """What must be equal where one leaf takes the place of another, in words."""
    return (
        f"{leaf.dtype} of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"of type {type(leaf).__name__}"
    )
