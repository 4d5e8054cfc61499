"""Running averages of the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.lazy import add_multiple
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter
from lrkfac.core.base.types import Tree
from lrkfac.transforms.base import GradientTransformation, apply_updates, check_params, check_state, transformation


class EmaParamsState(NamedTuple):
    """``average``: a tree like the parameters, to be read at evaluation; ``steps`` int64 ``[]``."""

    average: Tree
    steps: Tensor


def ema_params(decay: float = 0.98, power: float = 8.0) -> GradientTransformation:
    """Average the parameters after each update; updates pass unchanged.

    After step ``t`` the average is ``ξ average + (1 - ξ) parameters`` with ``ξ = min((t - 1)/(t + power), decay)``. At
    first the parameters of step ``k`` weigh in proportion to ``k^power``, so that the average forgets the start and
    reaches over about the last ``t/(power + 1)`` steps (Shamir & Zhang 2013, arXiv 1212.1824, section 4). Once ``ξ``
    is ``decay``, it is a running average of about ``1/(1 - decay)`` steps. It is the last link of a chain, in whose
    state it is ``state[-1].average``.

    Args:
        decay: Largest weight of the last average, in [0, 1). Where training converges without noise, an average lags
            behind: by little, while the parameters move by less than their distance to the minimum in its steps.
        power: How fast the start is forgotten, at least 0, which gives the mean of all parameters.

    Returns:
        A transformation with an ``EmaParamsState``.

    Raises:
        ValueError: If ``decay`` lies outside [0, 1) or ``power`` is negative; in ``update``, if ``params`` is missing
            or the trees do not fit.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx, params = ema_params(power=0), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(torch.ones(1), state, params)
        ...     params = params + updates
        >>> params, state.average
        (tensor([3.]), tensor([2.]))
    """
    return transformation(EmaParams(decay, power))


@dataclass(frozen=True, eq=False)
class EmaParams:
    """See ``ema_params``."""

    decay: float
    power: float

    def __post_init__(self) -> None:
        check_number(self.decay, "decay", 0, 1)
        check_number(self.power, "power", 0)

    def init(self, params: Tree) -> EmaParamsState:
        """Return a copy of the parameters as the average."""
        check_tree(params, "params")
        # Constants: the first update leaves nothing of them.
        return EmaParamsState(optree.tree_map(lambda p: p.detach().clone(), params), counter(params))

    def update(
        self, updates: Tree, state: EmaParamsState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, EmaParamsState]:
        """Average the parameters to which these updates lead."""
        check_state(state, EmaParamsState)
        check_like(state.average, updates, "updates")
        params = check_params(params, "ema_params", updates)
        check_like(state.average, params, "params")
        steps = state.steps + 1
        rest = torch.clamp((self.power + 1) / (steps + self.power), min=1 - self.decay)
        average = optree.tree_map(lambda *leaves: _averaged(rest, *leaves), state.average, params, updates)
        return updates, EmaParamsState(average, steps)


def _averaged(share: Tensor, average: Tensor, p: Tensor, update: Any) -> Tensor:
    """Return ``average + share (p + update - average)``, with one new tensor where dtypes agree."""
    if isinstance(update, Tensor) and {average.dtype, p.dtype, update.dtype} in ({torch.float32}, {torch.float64}):
        share = share.to(average.dtype)
        return add_multiple(torch.lerp(average, p, share), share, update, fresh=True)
    return (average + share * (apply_updates(p, update) - average)).to(average.dtype)
