"""Values values once for all parameters, or as a tree like the parameters."""

from __future__ import annotations

import math
from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.types import PerParameter, Tree


def is_number(value: Any) -> bool:
    """Return whether a value is one number, or tensor ``[]``, for all leaves."""
    return isinstance(value, int | float | Tensor)


def spread(values: Any, tree: Tree, name: str) -> Tree:
    """Return a tree of values like another, from one that may end earlier.

    Raises:
        ValueError: If it does not fit.
    """
    try:
        return optree.tree_map(lambda value, part: optree.tree_map(lambda _: value, part), values, tree)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected a tree like the parameters, or one that ends earlier, got {values!r} ({error})"
        ) from error


def of_leaves(values: PerParameter, tree: Tree, name: str) -> PerParameter:
    """Return a number unchanged, or a tree of numbers with one for each leaf of the tree.

    Raises:
        ValueError: If it does not fit.
    """
    return values if is_number(values) else spread(values, tree, name)


def at_step(values: PerParameter, step: Tensor) -> PerParameter:
    """Return a number, or a tree of numbers, with the values of schedules at a step."""
    return optree.tree_map(lambda one: one(step) if callable(one) else one, values)


def check_numbers(values: Any, name: str, low: float, high: float = math.inf, schedules: bool = False) -> None:
    """Raise unless a value is a number in ``[low, high)``, or a tree of such; ``schedules`` may stand for numbers.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a leaf is no number, or there is none.
    """
    leaves = optree.tree_leaves(values, none_is_leaf=True)
    if not leaves:
        raise TypeError(f"{name}: expected a number, or a tree of numbers like the parameters, got {values!r}")
    for path, leaf in zip(optree.tree_paths(values, none_is_leaf=True), leaves, strict=True):
        if not (schedules and callable(leaf)):
            check_number(leaf, f"{name} at {'.'.join(map(str, path))!r}" if path else name, low, high)
