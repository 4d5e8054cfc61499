"""Momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lrkfac.core.base.arguments import check_flag
from lrkfac.core.base.per_parameter import check_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import add_scaled, copied_or_lazy, materialize, zeros_like
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, check_state, transformation


class TraceState(NamedTuple):
    """``trace``: decaying sum of the updates, a tree like the parameters."""

    trace: Tree


def trace(decay: PerParameter, nesterov: bool = False) -> GradientTransformation:
    """Return momentum: ``t ← u + decay t``, and ``u + decay t`` with the new ``t`` for Nesterov's.

    Args:
        decay: Momentum in [0, 1): a number, or a tree of numbers like the parameters, or one that ends earlier.
        nesterov: Whether to look one step ahead.

    Returns:
        A transformation with a ``TraceState``. Its updates never share memory with the state.

    Raises:
        ValueError: If ``decay`` lies outside [0, 1); in ``init``, if it is a tree that does not fit the parameters; in
            ``update``, if the tree is not that of ``init``.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx = trace(0.5)
        >>> state = tx.init(torch.zeros(2))
        >>> for _ in range(3):
        ...     updates, state = tx.update(torch.ones(2), state)
        >>> updates
        tensor([1.7500, 1.7500])
    """
    return transformation(Trace(decay, nesterov))


@dataclass(frozen=True, eq=False)
class Trace:
    """See ``trace``."""

    decay: PerParameter
    nesterov: bool

    def __post_init__(self) -> None:
        check_numbers(self.decay, "decay", 0, 1)
        check_flag(self.nesterov, "nesterov")

    def init(self, params: Tree) -> TraceState:
        """Return a sum of zero."""
        check_tree(params, "params")
        of_leaves(self.decay, params, "decay")
        return TraceState(zeros_like(params))

    def update(self, updates: Tree, state: TraceState, params: Tree = None, **extra: Any) -> tuple[Tree, TraceState]:
        """Add the updates to the decayed sum."""
        check_state(state, TraceState)
        check_like(state.trace, updates, "trace: updates")
        decays = of_leaves(self.decay, updates, "decay")
        new = materialize(add_scaled(updates, decays, state.trace))
        ahead = add_scaled(updates, decays, new) if self.nesterov else copied_or_lazy(updates, new)
        return ahead, TraceState(new)
