"""Several micro-batches as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.tree_checks import check_like, check_tree, difference
from lrkfac.core.base.trees import counter, materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.statistics import Statistics
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


def merge_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of the micro-batches' union from one evaluation of each, all at the same parameters.

    Loss, gradients and Fisher products are means over micro-batches, each with its ``weight``, which equals the
    mean over all terms; rows of the statistics are put beside each other. So one update with
    the result is that of one batch, to rounding, for every structure and estimator:
    ``e = merge_evaluations([evaluate(params, x, y) for x, y in batches])``. Activations live for one micro-batch at
    a time, statistics and inputs for all of them.

    Outputs are joined along the batch, ``aux`` is the tuple of the micro-batches'. Micro-batches may differ in the
    number of examples (where the batch is the leading axis in every layer), not in any other length.

    Equality asks that the loss is a mean over the examples (batch normalisation in training mode mixes those of one
    micro-batch), and, for several heads, that the heads' weights of terms have the same proportions in each.

    Args:
        evaluations: At least one; either all with statistics or all without.

    Raises:
        ValueError: If there is none, or trees, layers or lengths differ.
        TypeError: If one is no ``Evaluation``.
    """
    if isinstance(evaluations, Evaluation) or not isinstance(evaluations, Sequence):
        raise TypeError(f"evaluations: expected a sequence of Evaluations, got {type(evaluations).__name__}")
    evaluations = tuple(evaluations)
    if not evaluations:
        raise ValueError("evaluations: expected at least one, got none")
    for i, one in enumerate(evaluations):
        if not isinstance(one, Evaluation):
            raise TypeError(f"evaluations[{i}]: expected an Evaluation, got {type(one).__name__}")
        check_like(evaluations[0].grads, one.grads, f"evaluations[{i}].grads")
    weights = torch.stack([one.weight for one in evaluations])
    shares = (weights / weights.sum()).unbind()

    def mean(trees: Sequence[Tree]) -> Tree:
        def of_leaf(*parts: Tensor) -> Tensor:
            terms = [_weighted(share, x) for share, x in zip(shares, parts, strict=True)]
            return torch.stack(terms).sum(dim=0).to(parts[0].dtype)

        return optree.tree_map(of_leaf, *trees)

    def of_each(name: str) -> Callable[..., Any]:
        return lambda *args: mean([getattr(one, name)(*args) for one in evaluations])

    aux = tuple(one.aux for one in evaluations)
    return Evaluation(
        loss=mean([one.loss for one in evaluations]),
        grads=mean([materialize(one.grads) for one in evaluations]),
        outputs=_joined([one.outputs for one in evaluations], 0, "outputs"),
        aux=None if all(one is None for one in aux) else aux,
        statistics=_merged([one.statistics for one in evaluations], shares),
        product=of_each("product"),
        quadratic=of_each("quadratic"),
        gram=of_each("gram"),
        loss_at=of_each("loss_at"),
        weight=weights.sum(),
    )


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
        total = optree.tree_map(lambda t, u: t + _weighted(weight, u).to(t.dtype), state.total, updates)
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


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """``weight * x``, 0 where the weight is: what a batch says in which nothing counts is not finite."""
    return torch.where(weight > 0, weight * wide(x), 0)


def _merged(statistics: list[Statistics | None], shares: Sequence[Tensor]) -> Statistics | None:
    found = [one for one in statistics if one is not None]
    if not found:
        return None
    if len(found) < len(statistics):
        raise ValueError("evaluations: expected statistics of all or of none, got some without")
    for i, one in enumerate(found):
        differs = difference(found[0][:2], one[:2])
        if differs is not None:
            raise ValueError(f"evaluations[{i}]: expected statistics of the same layers as the first, got {differs}")
    counted = [
        optree.tree_map(lambda g, share=share: torch.where(share > 0, g, 0), one.output_gradients)
        for one, share in zip(found, shares, strict=True)
    ]
    return Statistics(
        _joined([one.inputs for one in found], 0, "statistics: inputs"),
        _joined(counted, 1, "statistics: output gradients"),
        1 / torch.stack([1 / one.scale for one in found]).sum(),
    )


def _joined(trees: Sequence[Tree], axis: int, what: str) -> Tree:
    def of_leaf(*parts: Tensor) -> Tensor:
        rest = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in parts}
        if len(rest) > 1:
            raise ValueError(
                f"evaluations: {what} have the shapes {[tuple(x.shape) for x in parts]}, which differ in more than the "
                "number of examples; make micro-batches that are equal in all else, by padding where need be"
            )
        return torch.cat(parts, dim=axis)

    return optree.tree_map(of_leaf, *trees)
