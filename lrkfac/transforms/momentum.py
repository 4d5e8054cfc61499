"""Momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

from lrkfac.core.base.arguments import check_flag
from lrkfac.core.base.per_parameter import check_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import add_scaled, lazy_like, materialize, zeros_like
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, check_state


class TraceState(NamedTuple):
    """``trace``: a tree like the parameters."""

    trace: Tree


def trace(decay: PerParameter, nesterov: bool = False) -> GradientTransformation:
    """``t ← u + decay t``; returns ``t``, or ``u + decay t`` with the new ``t`` (Nesterov).

    Args:
        decay: Momentum in [0, 1): a number, or a tree of numbers like the parameters, or one that ends earlier.
        nesterov: Whether to look one step ahead.

    Raises:
        ValueError: If ``decay`` lies outside [0, 1); in ``init``, if it is a tree that does not fit the parameters; in
            ``update``, if the tree is not that of ``init``.
        TypeError: If an argument has the wrong type.
    """
    check_numbers(decay, "decay", 0, 1)
    check_flag(nesterov, "nesterov")

    def init(params: Tree) -> TraceState:
        check_tree(params, "params")
        of_leaves(decay, params, "decay")
        return TraceState(zeros_like(params))

    def update(updates: Tree, state: TraceState, params: Tree = None, **extra: Any) -> tuple[Tree, TraceState]:
        check_state(state, TraceState)
        check_like(state.trace, updates, "trace: updates")
        decays = of_leaves(decay, updates, "decay")
        new = materialize(add_scaled(updates, decays, state.trace))
        return (add_scaled(updates, decays, new) if nesterov else lazy_like(updates, new)), TraceState(new)

    return GradientTransformation(init, update)
