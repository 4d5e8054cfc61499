"""Values given once for all parameters, or as a tree like the parameters."""

from __future__ import annotations

import math
from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.types import PerParameter, Tree


def is_number(given: Any) -> bool:
    """Whether one number, or tensor ``[]``, is given for all leaves."""
    return isinstance(given, int | float | Tensor)


def spread(given: Any, tree: Tree, name: str) -> Tree:
    """A tree of values like another, from one that may end earlier.

    Raises:
        ValueError: If it does not fit.
    """
    try:
        return optree.tree_map(lambda value, part: optree.tree_map(lambda _: value, part), given, tree)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected a tree like the parameters, or one that ends earlier, got {given!r} ({error})"
        ) from error


def of_leaves(given: PerParameter, tree: Tree, name: str) -> PerParameter:
    """A number as it is, and a tree of numbers with one for each leaf of the tree.

    Raises:
        ValueError: If it does not fit.
    """
    return given if is_number(given) else spread(given, tree, name)


def at_step(given: PerParameter, step: Tensor) -> PerParameter:
    """The number, or the tree of numbers, with the values of schedules at a step."""
    return optree.tree_map(lambda one: one(step) if callable(one) else one, given)


def check_numbers(given: Any, name: str, low: float, high: float = math.inf, schedules: bool = False) -> None:
    """Refuses what is neither a number in ``[low, high)``, nor a tree of such; schedules are numbers where they may be.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a leaf is no number, or there is none.
    """
    leaves = optree.tree_leaves(given, none_is_leaf=True)
    if not leaves:
        raise TypeError(f"{name}: expected a number, or a tree of numbers like the parameters, got {given!r}")
    for path, leaf in zip(optree.tree_paths(given, none_is_leaf=True), leaves, strict=True):
        if not (schedules and callable(leaf)):
            check_number(leaf, f"{name} at {'.'.join(map(str, path))!r}" if path else name, low, high)
