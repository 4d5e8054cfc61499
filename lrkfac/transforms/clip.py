"""Clipping: entry by entry, by the length of a step in parameters, or in what the model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.dtypes import in_dtype, widest
from lrkfac.core.base.per_parameter import at_step, check_numbers, is_number, of_leaves
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter, materialize, scaled, vdot
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import GradientTransformation, Stateless, check_evaluation, check_state, transformation


class ClipByKLState(NamedTuple):
    """The state of ``clip_by_kl``.

    Attributes:
        steps: Number of updates so far, int64 ``[]``.
        factor: By which the last updates were multiplied, ``[]``: below 1 where the clip was active, else 1.
    """

    steps: Tensor
    factor: Tensor


def clip(max_delta: float | Tensor) -> GradientTransformation:
    """Limit each entry of the updates to ``[-max_delta, max_delta]``.

    Args:
        max_delta: A positive number, or a tensor ``[]``.

    Returns:
        A transformation without state.

    Raises:
        ValueError: If ``max_delta`` is not a positive finite number.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx = clip(1.0)
        >>> tx.update(torch.tensor([-3.0, 0.5]), tx.init(torch.zeros(2)))[0]
        tensor([-1.0000,  0.5000])
    """
    return transformation(Clip(max_delta))


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """Scale the updates such that the Euclidean norm over all leaves is at most ``max_norm``.

    Args:
        max_norm: A positive number.

    Returns:
        A transformation without state.

    Raises:
        ValueError: If ``max_norm`` is not a positive finite number.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx = clip_by_global_norm(1.0)
        >>> tx.update(torch.tensor([3.0, 4.0]), tx.init(torch.zeros(2)))[0]
        tensor([0.6000, 0.8000])
    """
    return transformation(ClipByGlobalNorm(max_norm))


def clip_by_kl(kl_clip: float, learning_rate: PerParameter) -> GradientTransformation:
    """Scale natural gradients ``u`` such that the step ``learning_rate * u`` changes the model little.

    For ``u = F⁻¹ ∇L`` the squared length of the step in the Fisher metric is ``learning_rate² uᵀF u =
    learning_rate² uᵀ∇L``, twice the Kullback–Leibler divergence to second order. ``kl_clip`` is a bound on it,
    wherever the package has an argument of this name. The factor is
    ``min(1, √(kl_clip / (learning_rate² uᵀ∇L)))`` (Ba, Grosse & Martens 2017, section 5).

    Place it directly after ``precondition_by_fisher``. Parameters that no layer covers count with ``u = ∇L``. While the
    clip is active, ``kl_clip`` determines the length of a step, and changing the learning rate has no effect. The
    state contains the last factor, and ``diagnose`` reports it.

    The bound applies only to ``u``, measured by the averages in ``F⁻¹``. Momentum after the clip makes steps longer, by
    up to ``1 / (1 - momentum)``. Outdated averages underestimate the change.

    Args:
        kl_clip: Bound on the squared length, in nats.
        learning_rate: Factor by which the chain multiplies later on: a number, a tensor ``[]`` or a schedule; or a
            tree of them, as in ``scale_by_learning_rate``: then ``uᵀ∇L`` is a sum over the parameters, each with its
            rate. 1 where updates are added as they are.

    Returns:
        A transformation with a ``ClipByKLState``.

    Raises:
        ValueError: If ``kl_clip`` is not a positive finite number, ``learning_rate`` a negative one; in ``update``, if
            it is a tree that does not fit.
        TypeError: In ``update``, if ``evaluation`` is missing.

    Examples:
        >>> import torch, lrkfac
        >>> params, x = {"w": torch.zeros(1, 2)}, torch.eye(2)
        >>> model = lambda params, x: x @ params["w"].T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.gaussian(), layers)(params, x, torch.ones(2, 1))
        >>> tx = clip_by_kl(0.02, learning_rate=0.1)
        >>> updates, _ = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> torch.equal(updates["w"], evaluation.grads["w"])
        True
    """
    return transformation(ClipByKL(kl_clip, learning_rate))


@dataclass(frozen=True, eq=False)
class Clip(Stateless):
    """See ``clip``."""

    max_delta: float | Tensor

    def __post_init__(self) -> None:
        check_number(self.max_delta, "max_delta", 0, includes_low=False)

    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        limit = self.max_delta
        return optree.tree_map(lambda u: u.clamp(-limit, limit).to(u.dtype), materialize(updates))


@dataclass(frozen=True, eq=False)
class ClipByGlobalNorm(Stateless):
    """See ``clip_by_global_norm``."""

    max_norm: float

    def __post_init__(self) -> None:
        check_number(self.max_norm, "max_norm", 0, includes_low=False)

    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        return scaled(_at_most_one(self.max_norm, vdot(updates, updates).sqrt()), updates)


@dataclass(frozen=True, eq=False)
class ClipByKL:
    """See ``clip_by_kl``."""

    kl_clip: float
    learning_rate: PerParameter

    def __post_init__(self) -> None:
        check_number(self.kl_clip, "kl_clip", 0, includes_low=False)
        check_numbers(self.learning_rate, "learning_rate", 0, schedules=True)

    def init(self, params: Tree) -> ClipByKLState:
        """Return step 0 and factor 1."""
        leaves, steps = check_tree(params, "params"), counter(params)
        return ClipByKLState(steps, (steps + 1).to(widest(torch.float32, *[leaf.dtype for leaf in leaves])))

    def update(
        self,
        updates: Tree,
        state: ClipByKLState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        **extra: Any,
    ) -> tuple[Tree, ClipByKLState]:
        """Scale the updates by the evaluation's gradients and the rate of this step."""
        check_state(state, ClipByKLState)
        gradients = check_evaluation(evaluation, "clip_by_kl").grads
        check_like(gradients, updates, "updates")
        rate = of_leaves(at_step(self.learning_rate, state.steps), updates, "learning_rate")
        if is_number(rate):
            squared_length = rate**2 * vdot(updates, gradients)
        else:
            squared_length = vdot(updates, gradients, optree.tree_map(lambda one: one**2, rate))
        factor = _at_most_one(self.kl_clip, squared_length).sqrt()
        new_state = ClipByKLState(state.steps + 1, in_dtype(factor.detach(), state.factor.dtype))
        return scaled(factor, updates), new_state


def _at_most_one(bound: float, size: Tensor) -> Tensor:
    """Return ``min(1, bound / size)``, 1 where ``size`` is 0 or, by rounding, negative."""
    return bound / torch.clamp(size, min=bound)
