"""Trees as flat dictionaries, which anything can save, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_values
from lrkfac.core.base.text import few
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree

Plain = bool | int | float | str
"""Types of a leaf that is no tensor."""

REMEDY = (
    "pass a tree like the one that was saved, made by the same transformation, with the same structure and rank, for "
    "the same layers"
)


def state_dict(tree: Tree) -> dict[str, Any]:
    """Return a flat dictionary from dotted paths to copies of a tree's leaves.

    ``torch.save(state_dict(state), file)`` needs no class of lrkfac to be read, so ``torch.load(file,
    weights_only=True)`` reads it. ``torch.distributed.checkpoint`` saves it, and loads into that of a fresh state.
    ``from_state_dict`` is the way back.

    Args:
        tree: Such as a state, or parameters. Leaves are tensors, numbers, or strings.

    Returns:
        A copy of each leaf under its path; where two paths are equal, the later one has a number behind ``#``.

    Raises:
        TypeError: If a leaf is something else; names it.

    Examples:
        >>> import torch, lrkfac
        >>> state = lrkfac.trace(0.9).init({"weight": torch.zeros(2)})
        >>> lrkfac.checkpoint.state_dict(state)
        {'trace.weight': tensor([0., 0.])}
    """
    return {name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for name, leaf in named(tree)}


def from_state_dict(like: Tree, state_dict: Mapping[str, Any]) -> Tree:
    """Return a tree with the structure of ``like`` and the leaves of a dictionary, on the devices of ``like``.

    Args:
        like: Such as ``tx.init(params)``; its values do not matter.
        state_dict: From ``state_dict`` of a tree of this structure, in any order.

    Returns:
        The tree; leaves that are on the right device already are not copied.

    Raises:
        ValueError: If a leaf is missing, unexpected, or has another shape or dtype, or no values; names it.
        TypeError: If ``state_dict`` is no mapping, or a leaf no tensor or number.

    Examples:
        >>> import torch, lrkfac
        >>> fresh = lrkfac.trace(0.9).init({"weight": torch.zeros(2)})
        >>> lrkfac.checkpoint.from_state_dict(fresh, {"trace.weight": torch.tensor([1.0, 2.0])})
        TraceState(trace={'weight': tensor([1., 2.])})
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected what state_dict(tree) returned, got {type(state_dict).__name__}")
    expected = dict(named(like, "like"))
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    if missing or unexpected:
        raise ValueError(
            "state_dict: it is of another transformation, structure or rank than like: missing "
            f"{few(missing)}, unexpected {few(unexpected)}; {REMEDY}"
        )
    leaves = []
    for name, leaf in expected.items():
        value = state_dict[name]
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            check_values(state_dict=value)
        if signature(value) != signature(leaf):
            raise ValueError(f"state_dict: expected {name!r} to be {signature(leaf)}, got {signature(value)}; {REMEDY}")
        leaves.append(value.to(leaf.device) if isinstance(leaf, Tensor) else value)
    return optree.tree_unflatten(optree.tree_structure(like), leaves)


def carry_over(new: Any, old: Any) -> Any:
    """Return a new state with the parts of an old one that fit: each name, such as a layer's, as a whole or not."""
    if _is_alike(new, old):
        return old
    if isinstance(new, dict) and isinstance(old, dict):
        kept = [name for name, x in new.items() if name in old and (_has_names(x) or _is_alike(x, old[name]))]
        return {**new, **{name: carry_over(new[name], old[name]) for name in kept}}
    if isinstance(new, tuple) and type(new) is type(old) and len(new) == len(old):
        parts = [carry_over(x, y) for x, y in zip(new, old, strict=True)]
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    return new


def named(tree: Tree, argument: str = "tree") -> list[tuple[str, Any]]:
    """Return each leaf with its name: its dotted path, with its number where an earlier leaf has the same.

    Raises:
        TypeError: If a leaf is neither tensor, number nor string.
    """
    leaves: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(zip(paths(tree), optree.tree_leaves(tree), strict=True)):
        if not isinstance(leaf, Tensor | Plain):
            raise TypeError(
                f"{argument}: expected {path!r} to be a tensor, a number or a string, got {type(leaf).__name__}"
            )
        while path in leaves:
            path += f"#{i}"
        leaves[path] = leaf
    return list(leaves.items())


def signature(leaf: Any) -> str:
    """Return dtype and shape of a tensor, or the type of another leaf, in words."""
    return (
        f"{leaf.dtype} of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"of type {type(leaf).__name__}"
    )


def _is_alike(new: Tree, old: Tree) -> bool:
    signatures = [[signature(x) for x in optree.tree_leaves(tree)] for tree in (new, old)]
    return signatures[0] == signatures[1] and optree.tree_structure(new) == optree.tree_structure(old)


def _has_names(state: Any) -> bool:
    return isinstance(state, dict) or (isinstance(state, tuple) and any(_has_names(part) for part in state))
