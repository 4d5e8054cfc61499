"""Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import counter, materialize, zeros_like
from lrkfac.core.base.types import Tree
from lrkfac.transforms.base import GradientTransformation, check_state, transformation


class AdamState(NamedTuple):
    """``mean`` and ``square``: averages of ``u`` and ``u²``, trees like the parameters; ``steps`` int64 ``[]``."""

    mean: Tree
    square: Tree
    steps: Tensor


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """Return Adam's direction ``m̂ / (√v̂ + eps)``, with bias-corrected averages of ``u`` and ``u²``.

    Args:
        b1: Decay of the mean, in [0, 1).
        b2: Decay of the mean square, in [0, 1).
        eps: Added to the root.

    Returns:
        A transformation with an ``AdamState`` (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1, without step size).

    Raises:
        ValueError: If an argument is out of range; in ``update``, if the tree is not that of ``init``.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx = scale_by_adam()
        >>> tx.update(torch.tensor([-3.0, 0.1]), tx.init(torch.zeros(2)))[0].round(decimals=3)
        tensor([-1.,  1.])
    """
    return transformation(ScaleByAdam(b1, b2, eps))


@dataclass(frozen=True, eq=False)
class ScaleByAdam:
    """See ``scale_by_adam``."""

    b1: float
    b2: float
    eps: float

    def __post_init__(self) -> None:
        check_number(self.b1, "b1", 0, 1)
        check_number(self.b2, "b2", 0, 1)
        check_number(self.eps, "eps", 0)

    def init(self, params: Tree) -> AdamState:
        """Return averages of zero."""
        check_tree(params, "params")
        return AdamState(zeros_like(params), zeros_like(params), counter(params))

    def update(self, updates: Tree, state: AdamState, params: Tree = None, **extra: Any) -> tuple[Tree, AdamState]:
        """Average the updates and their squares."""
        check_state(state, AdamState)
        check_like(state.mean, updates, "scale_by_adam: updates")
        updates = materialize(updates)
        b1, b2, steps = self.b1, self.b2, state.steps + 1
        mean = optree.tree_map(lambda m, u: (b1 * m + (1 - b1) * u).to(m.dtype), state.mean, updates)
        square = optree.tree_map(lambda v, u: (b2 * v + (1 - b2) * u.square()).to(v.dtype), state.square, updates)

        def scaled(m: Tensor, v: Tensor) -> Tensor:
            t = steps.to(torch.promote_types(m.dtype, torch.float32))
            return (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + self.eps)).to(m.dtype)

        return optree.tree_map(scaled, mean, square), AdamState(mean, square, steps)
