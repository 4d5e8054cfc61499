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


def ema_params(decay: float = 0.99) -> GradientTransformation:
    """Average the parameters as they are after each update; updates pass unchanged.

    After step ``t`` the average is ``ξ average + (1 - ξ) parameters`` with ``ξ = min(1 - 1/t, decay)``: the mean of
    all parameters at first, then a running average (Martens & Grosse 2015, arXiv 1503.05671, section 13). It is the
    last link of a chain, in whose state it stands as ``state[-1].average``.

    Args:
        decay: Largest weight of the last average, in [0, 1).

    Returns:
        A transformation with an ``EmaParamsState``.

    Raises:
        ValueError: If ``decay`` lies outside [0, 1); in ``update``, if ``params`` is missing or the trees do not fit.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx, params = ema_params(), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(torch.ones(1), state, params)
        ...     params = params + updates
        >>> params, state.average
        (tensor([3.]), tensor([2.]))
    """
    return transformation(EmaParams(decay))


@dataclass(frozen=True, eq=False)
class EmaParams:
    """See ``ema_params``."""

    decay: float

    def __post_init__(self) -> None:
        check_number(self.decay, "decay", 0, 1)

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
        rest = torch.clamp(1 / steps, min=1 - self.decay)
        average = optree.tree_map(lambda *leaves: _averaged(rest, *leaves), state.average, params, updates)
        return updates, EmaParamsState(average, steps)


def _averaged(share: Tensor, average: Tensor, p: Tensor, update: Any) -> Tensor:
    """Return ``average + share (p + update - average)``, with one new tensor where dtypes agree."""
    if isinstance(update, Tensor) and {average.dtype, p.dtype, update.dtype} in ({torch.float32}, {torch.float64}):
        share = share.to(average.dtype)
        return add_multiple(torch.lerp(average, p, share), share, update, fresh=True)
    return (average + share * (apply_updates(p, update) - average)).to(average.dtype)
