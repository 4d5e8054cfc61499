"""Scaling of updates: by a constant, or by a learning rate that may follow a schedule."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.per_parameter import at_step, check_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import counter, scaled
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, check_state, stateless


class ScheduleState(NamedTuple):
    """``steps``: number of updates so far, int64 ``[]``."""

    steps: Tensor


def scale(factor: float | Tensor) -> GradientTransformation:
    """``factor * u``.

    Raises:
        ValueError: If ``factor`` is a non-finite number.
        TypeError: If an argument has the wrong type.
    """
    check_number(factor, "factor", -math.inf)
    return stateless(lambda updates, params, **extra: scaled(factor, updates))


def scale_by_learning_rate(learning_rate: PerParameter) -> GradientTransformation:
    """``-learning_rate * u``: turns a direction of ascent into an update to add.

    Args:
        learning_rate: A number ≥ 0, a tensor ``[]`` or a schedule; or a tree of them like the parameters, or one that
            ends earlier: ``{"encoder": 0.01, "head": warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)}``.

    Raises:
        ValueError: If it is a negative or non-finite number; in ``init``, if it is a tree that does not fit.
        TypeError: If an argument has the wrong type.
    """
    check_numbers(learning_rate, "learning_rate", 0, schedules=True)

    def change(updates: Tree, rate: PerParameter) -> Tree:
        return scaled(of_leaves(optree.tree_map(operator.neg, rate), updates, "learning_rate"), updates)

    def check(params: Tree) -> None:
        if not callable(learning_rate):
            of_leaves(learning_rate, params, "learning_rate")

    if not any(callable(one) for one in optree.tree_leaves(learning_rate)):
        return stateless(lambda updates, params, **extra: change(updates, learning_rate), check)

    def init(params: Tree) -> ScheduleState:
        check_tree(params, "params")
        check(params)
        return ScheduleState(counter(params))

    def update(updates: Tree, state: ScheduleState, params: Tree = None, **extra: Any) -> tuple[Tree, ScheduleState]:
        check_tree(updates, "updates")
        check_state(state, ScheduleState)
        return change(updates, at_step(learning_rate, state.steps)), ScheduleState(state.steps + 1)

    return GradientTransformation(init, update)
