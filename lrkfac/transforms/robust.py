"""Steps that go wrong are left out."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import counter, selected, zero_unless
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import GradientTransformation, check_evaluation, check_state, check_transformation


class ApplyIfFiniteState(NamedTuple):
    """``inner``: the state of the transformation; ``consecutive``: the number of steps left out since the last good
    one, and ``total``: in all, int64 ``[]``.
    """

    inner: Any
    consecutive: Tensor
    total: Tensor


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int) -> GradientTransformation:
    """``inner`` where all is finite; else updates of zero, and the state of ``inner`` as it was.

    What must be finite is what goes in (updates, and of ``evaluation`` the loss and the statistics) and what comes
    out (updates). After ``max_consecutive_errors`` steps in a row that were left out, it gives up: the next one that
    is not finite goes to ``inner`` as it is, so that its result shows (or ``precondition_by_fisher`` refuses it), until
    a finite one comes. Momentum and weight decay rest in a step that is left out if they stand within ``inner``.

    Args:
        inner: The transformation, such as a whole chain.
        max_consecutive_errors: At least 1.

    Raises:
        ValueError: If ``max_consecutive_errors`` is below 1; in ``update``, if the state is another's.
        TypeError: If an argument has the wrong type.
    """
    check_transformation(inner, "inner")
    check_integer(max_consecutive_errors, "max_consecutive_errors")

    def init(params: Tree) -> ApplyIfFiniteState:
        check_tree(params, "params")
        return ApplyIfFiniteState(inner.init(params), counter(params), counter(params))

    def update(
        updates: Tree,
        state: ApplyIfFiniteState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, ApplyIfFiniteState]:
        check_tree(updates, "updates")
        check_state(state, ApplyIfFiniteState)
        if evaluation is not None:
            check_evaluation(evaluation, "apply_if_finite")
        said = None if evaluation is None else (evaluation.loss, evaluation.statistics)
        sound = _all_finite((updates, said))
        gives_up = state.consecutive >= max_consecutive_errors
        # A decomposition of what is not finite raises, even where its result is then not used.
        passed = sound | gives_up
        if evaluation is not None:
            of_step = (evaluation.loss, evaluation.grads, evaluation.statistics)
            loss, grads, statistics = zero_unless(passed, of_step)
            extra["evaluation"] = evaluation._replace(loss=loss, grads=grads, statistics=statistics)
        changed, new = inner.update(zero_unless(passed, updates), state.inner, params, **extra)
        sound = sound & _all_finite(changed)
        passed = sound | gives_up
        kept = selected(passed, new, state.inner)
        failed = (~sound).to(torch.int64)
        counted = (failed * (state.consecutive + 1), state.total + failed)
        return zero_unless(passed, changed), ApplyIfFiniteState(kept, *counted)

    return GradientTransformation(init, update)


def _all_finite(tree: Tree) -> Tensor:
    parts = optree.tree_map(lambda x: [x.left, x.right, *x.terms] if isinstance(x, LazyMatrix) else x, tree)
    tensors = [x for x in optree.tree_leaves(parts) if isinstance(x, Tensor)]
    leaves = [x.isfinite().all() for x in tensors]
    return torch.stack(leaves).all() if leaves else torch.ones((), dtype=torch.bool)
