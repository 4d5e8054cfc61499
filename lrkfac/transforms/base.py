"""The protocol of gradient transformations, and how they compose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import add_scaled
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation

T = TypeVar("T")


class GradientTransformation(NamedTuple):
    """Two pure functions.

    ``init(params) -> state`` and ``update(updates, state, params=None, **extra) -> (updates, state)``. A
    transformation that needs an extra takes it keyword-only and swallows the rest. Both raise ``ValueError`` for a
    tree or state that does not fit, and ``TypeError`` for what is no tree of floating-point tensors; nothing has
    changed then.
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


def stateless(change: Callable[..., Tree], check: Callable[[Tree], Any] | None = None) -> GradientTransformation:
    """A transformation without state from ``change(updates, params, **extra) -> updates``; ``check`` looks at the
    parameters at the start.
    """

    def init(params: Tree) -> tuple[()]:
        check_tree(params, "params")
        if check is not None:
            check(params)
        return ()

    def update(updates: Tree, state: tuple[()], params: Tree = None, **extra: Any) -> tuple[Tree, tuple[()]]:
        check_tree(updates, "updates")
        if not isinstance(state, tuple) or state:
            raise ValueError(f"state: expected (), that of a transformation without state, got {type(state).__name__}")
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
        check_transformation(transformation, f"chain: transformations[{i}]")

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
        ValueError: If the two trees differ in structure, shapes or devices; names the leaf.
        TypeError: If a leaf of ``params`` is no floating-point tensor.
    """
    check_tree(params, "params")
    check_like(params, updates, "updates")
    return add_scaled(params, 1.0, updates)


def check_params(params: Tree, name: str) -> Tree:
    """Refuses a missing ``params``."""
    if params is None:
        raise ValueError(f"{name}: params is missing; call update(updates, state, params)")
    return params


def check_state(state: Any, expected: type[T]) -> T:
    """Refuses the state of another transformation."""
    if not isinstance(state, expected):
        article = "an" if expected.__name__[0] in "AE" else "a"
        raise ValueError(
            f"state: expected {article} {expected.__name__}, got {type(state).__name__}; pass what init() or the last "
            "update() of this transformation returned"
        )
    return state


def check_evaluation(evaluation: Any, name: str) -> Evaluation:
    """Refuses a missing ``evaluation``, and what is none."""
    if evaluation is None:
        raise TypeError(
            f"{name}: evaluation is missing; call "
            "update(evaluation.grads, state, params, evaluation=evaluate(params, inputs, targets))"
        )
    if not isinstance(evaluation, Evaluation):
        raise TypeError(f"evaluation: expected an Evaluation as evaluator() makes it, got {type(evaluation).__name__}")
    return evaluation


def check_transformation(given: Any, name: str) -> None:
    """Refuses what is no ``GradientTransformation``."""
    if not isinstance(given, GradientTransformation):
        raise TypeError(
            f"{name}: expected a GradientTransformation, got {type(given).__name__}; call the function that makes it, "
            "as in chain(trace(0.9), scale(-0.1))"
        )


def preconditions(state: Any) -> bool:
    """Whether the state of a transformation that takes ``factor_damping`` is among these."""
    if getattr(state, "preconditions", False):
        return True
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple | list) else ()
    return any(preconditions(part) for part in parts)
