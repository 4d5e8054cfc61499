"""Skip non-finite steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import all_finite, counter, selected, zero_unless
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_state,
    check_transformation,
    transformation,
)


class ApplyIfFiniteState(NamedTuple):
    """``inner``: state of the inner transformation; ``consecutive``: number of steps skipped since the last good one,
    and ``total``: in all, int64 ``[]``.
    """

    inner: Any
    consecutive: Tensor
    total: Tensor


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int) -> GradientTransformation:
    """Skip non-finite steps: return updates of zero then, and the state of ``inner`` as it was.

    Finite must be what goes in (updates, and of ``evaluation`` the loss and the statistics) and what comes out
    (updates). After ``max_consecutive_errors`` skipped steps in a row, the next one that is not finite goes to
    ``inner`` unchanged, and its result shows (or ``precondition_by_fisher`` raises), until a finite one comes.
    A step with statistics that are not finite on one process is skipped on all.
    Momentum and weight decay do not change in a skipped step if they are part of ``inner``.

    Args:
        inner: The transformation, such as a whole chain.
        max_consecutive_errors: At least 1.

    Returns:
        A transformation with an ``ApplyIfFiniteState``.

    Raises:
        ValueError: If ``max_consecutive_errors`` is below 1; in ``update``, if the state is another's.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> tx = apply_if_finite(lrkfac.scale(-1.0), max_consecutive_errors=3)
        >>> updates, state = tx.update(torch.tensor([float("nan")]), tx.init(torch.zeros(1)))
        >>> updates, state.total
        (tensor([0.]), tensor(1))
    """
    check_transformation(inner, "inner")
    check_integer(max_consecutive_errors, "max_consecutive_errors")
    return transformation(ApplyIfFinite(inner, max_consecutive_errors))


@dataclass(frozen=True, eq=False)
class ApplyIfFinite:
    """See ``apply_if_finite``."""

    inner: GradientTransformation
    max_consecutive_errors: int

    def init(self, params: Tree) -> ApplyIfFiniteState:
        """Return the inner state, and no skipped steps."""
        check_tree(params, "params")
        # Each tensor with memory of its own, as in every later state: else a step is compiled once more.
        inner = optree.tree_map(torch.clone, self.inner.init(params))
        return ApplyIfFiniteState(inner, counter(params), counter(params))

    def update(
        self,
        updates: Tree,
        state: ApplyIfFiniteState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, ApplyIfFiniteState]:
        """Return the inner updates and state, or zeros and the last state."""
        check_tree(updates, "updates")
        check_state(state, ApplyIfFiniteState)
        if evaluation is not None:
            check_evaluation(evaluation, "apply_if_finite")
        measured = None if evaluation is None else (evaluation.loss, evaluation.statistics)
        sound = _of_all(all_finite((updates, measured)), evaluation)
        gives_up = state.consecutive >= self.max_consecutive_errors
        # A decomposition of what is not finite raises, even where its result is then not used.
        passed = sound | gives_up
        if evaluation is not None:
            of_step = (evaluation.loss, evaluation.grads, evaluation.statistics)
            loss, grads, statistics = zero_unless(passed, of_step)
            extra["evaluation"] = evaluation._replace(loss=loss, grads=grads, statistics=statistics)
        changed, new = self.inner.update(zero_unless(passed, updates), state.inner, params, **extra)
        sound = sound & all_finite(changed)
        passed = sound | gives_up
        failed = (~sound).to(state.total.dtype)
        counts = (failed * (state.consecutive + 1), state.total + failed)
        return zero_unless(passed, changed), ApplyIfFiniteState(selected(passed, new, state.inner), *counts)


def _of_all(sound: Tensor, evaluation: Evaluation | None) -> Tensor:
    """Return whether all processes of a joint batch are sound; statistics, unlike the rest, are those of each."""
    if evaluation is None or evaluation.among is None or evaluation.statistics is None:
        return sound
    (faults,) = evaluation.among.processes.sum([(~sound).to(torch.float32)])
    return faults == 0
