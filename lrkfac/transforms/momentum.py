"""Momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

from lrkfac.core.checks import need_flag, need_number
from lrkfac.core.tree import add_scaled, check_like, check_tree, formed, unformed_like, zeros_like
from lrkfac.core.types import Tree
from lrkfac.transforms.base import GradientTransformation, need_state


class TraceState(NamedTuple):
    """``trace``: a tree like the parameters."""

    trace: Tree


def trace(decay: float, nesterov: bool = False) -> GradientTransformation:
    """``t ← u + decay t``; returns ``t``, or ``u + decay t`` with the new ``t`` (Nesterov).

    Args:
        decay: Momentum in [0, 1).
        nesterov: Whether to look one step ahead.

    Raises:
        ValueError: If ``decay`` lies outside [0, 1); in ``update``, if the tree is not that of ``init``.
        TypeError: If an argument has the wrong type.
    """
    need_number(decay, "decay", 0, 1)
    need_flag(nesterov, "nesterov")

    def init(params: Tree) -> TraceState:
        check_tree(params, "params")
        return TraceState(zeros_like(params))

    def update(updates: Tree, state: TraceState, params: Tree = None, **extra: Any) -> tuple[Tree, TraceState]:
        need_state(state, TraceState)
        check_like(state.trace, updates, "trace: updates")
        new = formed(add_scaled(updates, decay, state.trace))
        return (add_scaled(updates, decay, new) if nesterov else unformed_like(updates, new)), TraceState(new)

    return GradientTransformation(init, update)
