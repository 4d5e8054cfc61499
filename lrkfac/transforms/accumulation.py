"""Gradient accumulation over micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter, materialize, selected, weighted
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_state,
    check_transformation,
    preconditions,
    transformation,
)


class AccumulateState(NamedTuple):
    """State of ``accumulate``.

    Attributes:
        inner: State of the inner transformation.
        total: Weighted sum of the updates since its last step, in at least float32.
        weight: Sum of their weights, ``[]``.
        steps: Number of them, int64 ``[]``.
    """

    inner: Any
    total: Tree
    weight: Tensor
    steps: Tensor


def accumulate(inner: GradientTransformation, every: int) -> GradientTransformation:
    """Apply ``inner`` once in ``every`` steps to the mean of the updates since then; return zeros in between.

    For transformations that need only gradients, such as Adam. K-FAC, which needs ``evaluation``, takes one update with
    ``merge_evaluations`` of the micro-batches instead: its statistics have shapes that no state can hold in advance.

    If ``evaluation`` is passed, each micro-batch counts with its ``weight``, so the mean is over all their
    terms; else all count equally. ``inner`` does not get it.

    Args:
        inner: The transformation, such as a whole chain. It is computed in every step and used in the last.
        every: Number of micro-batches, at least 1.

    Returns:
        A transformation with an ``AccumulateState``.

    Raises:
        ValueError: If ``every`` is below 1; in ``init``, if ``inner`` preconditions; in ``update``, if the tree or the
            state do not fit, or ``evaluation`` has statistics.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> tx = accumulate(lrkfac.scale(-1.0), every=2)
        >>> first, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
        >>> second, state = tx.update(torch.tensor([3.0]), state)
        >>> first, second
        (tensor([0.]), tensor([-2.]))
    """
    check_transformation(inner, "inner")
    check_integer(every, "every")
    return transformation(Accumulate(inner, every))


@dataclass(frozen=True, eq=False)
class Accumulate:
    """See ``accumulate``."""

    inner: GradientTransformation
    every: int

    def init(self, params: Tree) -> AccumulateState:
        """Return the inner state and an empty sum."""
        check_tree(params, "params")
        total = optree.tree_map(lambda p: torch.zeros_like(wide(p)), params)
        leaves = optree.tree_leaves(total)
        weight = torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device) if leaves else torch.zeros(())
        started = self.inner.init(params)
        if preconditions(started):
            raise ValueError(f"inner: it preconditions, and needs the statistics of all micro-batches; {_REMEDY}")
        return AccumulateState(started, total, weight, counter(params))

    def update(
        self,
        updates: Tree,
        state: AccumulateState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, AccumulateState]:
        """Add the updates to the sum; apply the inner transformation where it is its turn."""
        check_state(state, AccumulateState)
        if evaluation is not None and check_evaluation(evaluation, "accumulate").statistics is not None:
            raise ValueError(
                f"accumulate: expected an evaluation without statistics, which are not accumulated; {_REMEDY}"
            )
        check_like(state.total, updates, "accumulate: updates")
        updates = materialize(updates)
        weight = torch.ones_like(state.weight) if evaluation is None else evaluation.weight.to(state.weight.dtype)
        total = optree.tree_map(lambda t, u: t + weighted(weight, u).to(t.dtype), state.total, updates)
        weight, steps = state.weight + weight, state.steps + 1
        positive = weight.clamp(min=torch.finfo(weight.dtype).tiny)
        mean = optree.tree_map(lambda t, u: (t / positive).to(u.dtype), total, updates)
        changed, new = self.inner.update(mean, state.inner, params, **extra)
        last = steps >= self.every
        total, weight, steps = optree.tree_map(lambda x: torch.where(last, 0, x), (total, weight, steps))
        inner = selected(last, new, state.inner)
        return optree.tree_map(lambda u: torch.where(last, u, 0), changed), AccumulateState(inner, total, weight, steps)


_REMEDY = (
    "make one batch of the micro-batches, e = merge_evaluations([...]), and one update(e.grads, state, params, "
    "evaluation=e)"
)
