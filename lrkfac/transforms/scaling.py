"""Scaling of updates: by a constant, or by a learning rate that may follow a schedule."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.per_parameter import at_step, check_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import counter, scaled
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, Stateless, check_state, transformation


class ScheduleState(NamedTuple):
    """``steps``: number of updates so far, int64 ``[]``."""

    steps: Tensor


def scale(factor: float | Tensor) -> GradientTransformation:
    """Return ``factor * u``.

    Args:
        factor: A finite number, or a tensor ``[]``.

    Returns:
        A transformation without state.

    Raises:
        ValueError: If ``factor`` is a non-finite number.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx = scale(-0.5)
        >>> tx.update(torch.ones(2), tx.init(torch.zeros(2)))[0]
        tensor([-0.5000, -0.5000])
    """
    return transformation(Scale(factor))


def scale_by_learning_rate(learning_rate: PerParameter) -> GradientTransformation:
    """Return ``-learning_rate * u``: turn a direction of ascent into an update to add.

    Args:
        learning_rate: A number ≥ 0, a tensor ``[]`` or a schedule; or a tree of them like the parameters, or one that
            ends earlier: ``{"encoder": 0.01, "head": warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)}``.

    Returns:
        A transformation, with a ``ScheduleState`` if there is a schedule, else without state.

    Raises:
        ValueError: If it is a negative or non-finite number; in ``init``, if it is a tree that does not fit.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx = scale_by_learning_rate({"encoder": 0.0, "head": 0.1})
        >>> gradients = {"encoder": torch.ones(1), "head": torch.ones(1)}
        >>> tx.update(gradients, tx.init(gradients))[0]["head"]
        tensor([-0.1000])
    """
    if any(callable(one) for one in optree.tree_leaves(learning_rate)):
        return transformation(ScaleBySchedule(learning_rate))
    return transformation(ScaleByLearningRate(learning_rate))


@dataclass(frozen=True, eq=False)
class Scale(Stateless):
    """See ``scale``."""

    factor: float | Tensor

    def __post_init__(self) -> None:
        check_number(self.factor, "factor", -math.inf)

    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        return scaled(self.factor, updates)


@dataclass(frozen=True, eq=False)
class ScaleByLearningRate(Stateless):
    """See ``scale_by_learning_rate``; all rates are numbers."""

    learning_rate: PerParameter

    def __post_init__(self) -> None:
        check_numbers(self.learning_rate, "learning_rate", 0)

    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        return _descend(self.learning_rate, updates)

    def check_params(self, params: Tree) -> None:
        of_leaves(self.learning_rate, params, "learning_rate")


@dataclass(frozen=True, eq=False)
class ScaleBySchedule:
    """See ``scale_by_learning_rate``; some rates are schedules."""

    learning_rate: PerParameter

    def __post_init__(self) -> None:
        check_numbers(self.learning_rate, "learning_rate", 0, schedules=True)

    def init(self, params: Tree) -> ScheduleState:
        """Return step 0."""
        check_tree(params, "params")
        if not callable(self.learning_rate):
            of_leaves(self.learning_rate, params, "learning_rate")
        return ScheduleState(counter(params))

    def update(
        self, updates: Tree, state: ScheduleState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, ScheduleState]:
        """Scale by the rate of this step."""
        check_tree(updates, "updates")
        check_state(state, ScheduleState)
        return _descend(at_step(self.learning_rate, state.steps), updates), ScheduleState(state.steps + 1)


def _descend(rate: PerParameter, updates: Tree) -> Tree:
    return scaled(of_leaves(optree.tree_map(operator.neg, rate), updates, "learning_rate"), updates)
