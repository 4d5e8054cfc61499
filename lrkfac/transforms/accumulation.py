"""Several micro-batches as one batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter, materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.merging import weighted
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_state,
    check_transformation,
    preconditions,
)


class AccumulateState(NamedTuple):
    """``inner``: the state of the transformation; ``total``: the weighted sum of the updates since its last step, in at
    least float32, and ``weight`` that of their weights, ``[]``; ``steps``: their number, int64 ``[]``.
    """

    inner: Any
    total: Tree
    weight: Tensor
    steps: Tensor


def accumulate(inner: GradientTransformation, every: int) -> GradientTransformation:
    """``inner`` once in ``every`` steps, with the mean of the updates since then; zero updates in between.

    For transformations of gradients alone, such as Adam. What needs ``evaluation``, as K-FAC does, takes one update
    with ``merge_evaluations`` of the micro-batches instead: its statistics have shapes that no state can hold in
    advance.

    Where ``evaluation`` is given, each micro-batch counts with its ``weight``, so that the mean is over all their
    terms; else all count equally. It is not handed on.

    Args:
        inner: The transformation, such as a whole chain. It is computed in every step and used in the last.
        every: Number of micro-batches, at least 1.

    Raises:
        ValueError: If ``every`` is below 1; in ``init``, if ``inner`` preconditions; in ``update``, if the tree or the
            state do not fit, or ``evaluation`` has statistics.
        TypeError: If an argument has the wrong type.
    """
    check_transformation(inner, "inner")
    check_integer(every, "every")

    def init(params: Tree) -> AccumulateState:
        check_tree(params, "params")
        total = optree.tree_map(lambda p: torch.zeros_like(wide(p)), params)
        leaves = optree.tree_leaves(total)
        weight = torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device) if leaves else torch.zeros(())
        started = inner.init(params)
        if preconditions(started):
            raise ValueError(f"inner: it preconditions, and needs the statistics of all micro-batches; {_REMEDY}")
        return AccumulateState(started, total, weight, counter(params))

    def update(
        updates: Tree,
        state: AccumulateState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, AccumulateState]:
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
        changed, new = inner.update(mean, state.inner, params, **extra)
        last = steps >= every
        kept = optree.tree_map(lambda x, y: x if x is y else torch.where(last, x, y), new, state.inner)
        total, weight, steps = optree.tree_map(lambda x: torch.where(last, 0, x), (total, weight, steps))
        return optree.tree_map(lambda u: torch.where(last, u, 0), changed), AccumulateState(kept, total, weight, steps)

    return GradientTransformation(init, update)


_REMEDY = (
    "make one batch of the micro-batches, e = merge_evaluations([...]), and one update(e.grads, state, params, "
    "evaluation=e)"
)
