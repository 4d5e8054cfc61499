"""Running averages of the parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter
from lrkfac.core.base.types import Tree
from lrkfac.transforms.base import GradientTransformation, apply_updates, check_params, check_state


class EmaParamsState(NamedTuple):
    """``average``: a tree like the parameters, to be read at evaluation; ``steps`` int64 ``[]``."""

    average: Tree
    steps: Tensor


def ema_params(decay: float = 0.99) -> GradientTransformation:
    """Averages the parameters as they are after each update; updates pass unchanged. The last link of a chain.

    After step ``t`` the average is ``ξ average + (1 - ξ) parameters`` with ``ξ = min(1 - 1/t, decay)``: the mean of
    all parameters at first, then a running average (Martens & Grosse 2015, arXiv 1503.05671, section 13). It
    stands in the state: ``state[-1].average`` in a chain that ends with it.

    Args:
        decay: In [0, 1).

    Raises:
        ValueError: If ``decay`` lies outside [0, 1); in ``update``, if ``params`` is missing or the trees do not fit.
        TypeError: If an argument has the wrong type.
    """
    check_number(decay, "decay", 0, 1)

    def init(params: Tree) -> EmaParamsState:
        check_tree(params, "params")
        return EmaParamsState(optree.tree_map(torch.clone, params), counter(params))

    def update(updates: Tree, state: EmaParamsState, params: Tree = None, **extra: Any) -> tuple[Tree, EmaParamsState]:
        check_state(state, EmaParamsState)
        check_like(state.average, updates, "updates")
        check_like(state.average, check_params(params, "ema_params"), "params")
        moved = apply_updates(params, updates)
        steps = state.steps + 1
        rest = torch.clamp(1 / steps, min=1 - decay)
        average = optree.tree_map(lambda a, p: (a + rest * (p - a)).to(a.dtype), state.average, moved)
        return updates, EmaParamsState(average, steps)

    return GradientTransformation(init, update)
