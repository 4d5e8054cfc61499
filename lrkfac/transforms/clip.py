"""Clipping: entry by entry, by the length of a step in parameters, or in what the model says."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.per_parameter import at_step, check_numbers, is_number, of_leaves
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter, materialize, scaled, vdot
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import GradientTransformation, check_evaluation, check_state, stateless


class ClipByKLState(NamedTuple):
    """``steps``: number of updates so far, int64 ``[]``."""

    steps: Tensor


def clip(max_delta: float | Tensor) -> GradientTransformation:
    """Each entry of the updates, at least ``-max_delta`` and at most ``max_delta``.

    Raises:
        ValueError: If ``max_delta`` is not a positive finite number.
        TypeError: If an argument has the wrong type.
    """
    check_number(max_delta, "max_delta", 0, includes_low=False)

    def change(updates: Tree, params: Tree, **extra: Any) -> Tree:
        return optree.tree_map(lambda u: u.clamp(-max_delta, max_delta).to(u.dtype), materialize(updates))

    return stateless(change)


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """Scales the updates such that the Euclidean norm over all leaves is at most ``max_norm``.

    Raises:
        ValueError: If ``max_norm`` is not a positive finite number.
        TypeError: If an argument has the wrong type.
    """
    check_number(max_norm, "max_norm", 0, includes_low=False)

    def change(updates: Tree, params: Tree, **extra: Any) -> Tree:
        norm = vdot(updates, updates).sqrt()
        return scaled(_at_most_one(max_norm, norm), updates)

    return stateless(change)


def clip_by_kl(max_kl: float, learning_rate: PerParameter = 1.0) -> GradientTransformation:
    """Scales natural gradients ``u`` such that the step ``learning_rate * u`` changes the model little.

    For ``u = F⁻¹ ∇L`` the squared length of the step in the Fisher metric is ``learning_rate² uᵀF u =
    learning_rate² uᵀ∇L``, twice the Kullback–Leibler divergence to second order. The factor is
    ``min(1, √(max_kl / (learning_rate² uᵀ∇L)))`` (Ba, Grosse & Martens 2017, section 5).

    Stands right after ``precondition_by_fisher``. Parameters that no layer covers count with ``u = ∇L``. While the
    clip binds, the length of a step depends on ``max_kl`` alone and the learning rate cancels.

    Args:
        max_kl: Bound on the squared length.
        learning_rate: What the chain multiplies by later on: a number, a tensor ``[]`` or a schedule; or a tree of
            them, as in ``scale_by_learning_rate``: then ``uᵀ∇L`` is a sum over the parameters, each with its own rate.

    Raises:
        ValueError: If ``max_kl`` is not a positive finite number, ``learning_rate`` a negative one; in ``update``, if
            it is a tree that does not fit.
        TypeError: In ``update``, if ``evaluation`` is missing.
    """
    check_number(max_kl, "max_kl", 0, includes_low=False)
    check_numbers(learning_rate, "learning_rate", 0, schedules=True)

    def init(params: Tree) -> ClipByKLState:
        check_tree(params, "params")
        return ClipByKLState(counter(params))

    def update(
        updates: Tree,
        state: ClipByKLState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, ClipByKLState]:
        check_state(state, ClipByKLState)
        check_like(check_evaluation(evaluation, "clip_by_kl").grads, updates, "updates")
        assert evaluation is not None
        rate = of_leaves(at_step(learning_rate, state.steps), updates, "learning_rate")
        if is_number(rate):
            squared_length = rate**2 * vdot(updates, evaluation.grads)
        else:
            squared_length = vdot(updates, evaluation.grads, optree.tree_map(lambda one: one**2, rate))
        return scaled(_at_most_one(max_kl, squared_length).sqrt(), updates), ClipByKLState(state.steps + 1)

    return GradientTransformation(init, update)


def _at_most_one(bound: float, size: Tensor) -> Tensor:
    """``min(1, bound / size)``, 1 where ``size`` is 0 or, by rounding, negative."""
    return bound / torch.clamp(size, min=bound)
