"""The protocol of gradient transformations, and how they compose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.tree import add_scaled, check_like
from lrkfac.core.types import Tree


class GradientTransformation(NamedTuple):
    """Two pure functions.

    ``init(params) -> state`` and ``update(updates, state, params=None, **extra) -> (updates, state)``. A
    transformation that needs an extra takes it keyword-only and swallows the rest.
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


def stateless(change: Callable[..., Tree]) -> GradientTransformation:
    """A transformation without state from ``change(updates, params, **extra) -> updates``."""

    def init(params: Tree) -> tuple[()]:
        return ()

    def update(updates: Tree, state: tuple[()], params: Tree = None, **extra: Any) -> tuple[Tree, tuple[()]]:
        return change(updates, params, **extra), state

    return GradientTransformation(init, update)


def identity() -> GradientTransformation:
    """Returns the updates as they are."""
    return stateless(lambda updates, params, **extra: updates)


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after another; the state is the tuple of their states.

    Raises:
        TypeError: If an argument is no ``GradientTransformation``.
        ValueError: In ``update``, if the state is not one of this chain.
    """
    for i, transformation in enumerate(transformations):
        if not isinstance(transformation, GradientTransformation):
            raise TypeError(
                f"chain: expected a GradientTransformation in place {i}, got {type(transformation).__name__}; "
                "call the function that makes it, as in chain(trace(0.9), scale(-0.1))"
            )

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(t.init(params) for t in transformations)

    def update(
        updates: Tree, state: tuple[Any, ...], params: Tree = None, **extra: Any
    ) -> tuple[Tree, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(transformations):
            raise ValueError(
                f"state: expected a tuple of {len(transformations)} states, one for each transformation of the "
                f"chain, got {type(state).__name__}; pass what init() or the last update() of this chain returned"
            )
        states = []
        for transformation, old in zip(transformations, state, strict=True):
            updates, new = transformation.update(updates, old, params, **extra)
            states.append(new)
        return updates, tuple(states)

    return GradientTransformation(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """``params + updates``, in the dtype of the parameters.

    Raises:
        ValueError: If the two trees differ in structure or shapes; names the leaf.
    """
    check_like(params, updates, "updates")
    return add_scaled(params, 1.0, updates)


def need_params(params: Tree, name: str) -> Tree:
    """Refuses a missing ``params``."""
    if params is None:
        raise ValueError(f"{name}: params is missing; call update(updates, state, params)")
    return params


def need_number(
    value: float | Tensor, name: str, low: float, high: float = math.inf, includes_low: bool = True
) -> None:
    """Refuses a number that is not finite, or outside ``[low, high)`` or ``(low, high)``; a tensor passes."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    above = value >= low if includes_low else value > low
    if not (math.isfinite(value) and above and value < high):
        bracket = "[" if includes_low else "("
        raise ValueError(f"{name}: expected a finite number in {bracket}{low}, {high}), got {value}")
