"""The protocol of gradient transformations, and how they compose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from lrkfac.core.base.autograd import constant_unless
from lrkfac.core.base.sharding import local_parts, shard_like
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.trees import add_scaled
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation

T = TypeVar("T")


class GradientTransformation(NamedTuple):
    """Hold the two pure functions of a gradient transformation.

    ``init(params) -> state`` and ``update(updates, state, params=None, **extra) -> (updates, state)``. A
    transformation that needs an extra takes it keyword-only and ignores the rest. Both raise ``ValueError`` for a
    tree or state that does not fit, and ``TypeError`` for anything but a tree of floating-point tensors; nothing has
    changed then.

    Those of the package copy, pickle and compile: their functions are methods of frozen dataclasses. A custom one may
    consist of any two functions.

    Attributes:
        init: Returns the state before the first step.
        update: Returns new updates and the next state.

    Examples:
        >>> import torch
        >>> def update(updates, state, params=None, **extra):
        ...     return updates.sign(), state
        >>> sign = GradientTransformation(lambda params: (), update)
        >>> sign.update(torch.tensor([-2.0, 3.0]), sign.init(torch.zeros(2)))[0]
        tensor([-1.,  1.])
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


class Link(Protocol):
    """An object with the two functions as methods."""

    def init(self, params: Tree) -> Any:
        """Return the state before the first step."""
        ...

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
        """Return new updates and the next state."""
        ...


def transformation(link: Link) -> GradientTransformation:
    """Return the transformation whose functions are the methods of an object."""
    return GradientTransformation(link.init, link.update)


@dataclass(frozen=True, eq=False)
class Stateless(ABC):
    """A transformation without state; a subclass says how updates change."""

    @abstractmethod
    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        """Return the new updates."""

    def check_params(self, params: Tree) -> None:  # noqa: B027
        """Raise if hyperparameters do not fit the parameters; by default they do."""

    def init(self, params: Tree) -> tuple[()]:
        """Return the empty state."""
        check_tree(params, "params")
        self.check_params(params)
        return ()

    def update(self, updates: Tree, state: tuple[()], params: Tree = None, **extra: Any) -> tuple[Tree, tuple[()]]:
        """Return the new updates and the empty state."""
        check_tree(updates, "updates")
        if not isinstance(state, tuple) or state:
            raise ValueError(f"state: expected (), that of a transformation without state, got {type(state).__name__}")
        return self.change(updates, params, **extra), state


@dataclass(frozen=True, eq=False)
class Identity(Stateless):
    """See ``identity``."""

    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        return updates


def identity() -> GradientTransformation:
    """Return updates unchanged.

    Returns:
        A transformation without state.

    Examples:
        >>> import torch
        >>> tx = identity()
        >>> tx.update(torch.ones(2), tx.init(torch.zeros(2)))
        (tensor([1., 1.]), ())
    """
    return transformation(Identity())


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after another.

    Args:
        *transformations: In the order in which they see the updates.

    Returns:
        A transformation whose state is the tuple of their states.

    Raises:
        TypeError: If an argument is no ``GradientTransformation``.
        ValueError: In ``update``, if the state is not one of this chain.

    Examples:
        >>> import torch, lrkfac
        >>> tx = chain(lrkfac.trace(0.9), lrkfac.scale(-0.1))
        >>> updates, state = tx.update(torch.ones(2), tx.init(torch.zeros(2)))
        >>> updates, len(state)
        (tensor([-0.1000, -0.1000]), 2)
    """
    for i, one in enumerate(transformations):
        check_transformation(one, f"chain: transformations[{i}]")
    return transformation(Chain(transformations))


@dataclass(frozen=True, eq=False)
class Chain:
    """See ``chain``."""

    transformations: tuple[GradientTransformation, ...]

    def init(self, params: Tree) -> tuple[Any, ...]:
        """Return the states of all transformations."""
        return tuple(t.init(params) for t in self.transformations)

    def update(
        self, updates: Tree, state: tuple[Any, ...], params: Tree = None, **extra: Any
    ) -> tuple[Tree, tuple[Any, ...]]:
        """Hand updates from one transformation to the next."""
        if not isinstance(state, tuple) or len(state) != len(self.transformations):
            raise ValueError(
                f"state: expected a tuple of {len(self.transformations)} states, one for each transformation of the "
                f"chain, got {type(state).__name__}; pass what init() or the last update() of this chain returned"
            )
        states = []
        for link, old in zip(self.transformations, state, strict=True):
            updates, new = link.update(updates, old, params, **extra)
            states.append(new)
        return updates, tuple(states)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return ``params + updates``, in the dtype of the parameters.

    The result requires gradients only where ``updates`` do: parameters that require them, as those of a module do, are
    otherwise constants; see ``differentiable`` of ``evaluator``.

    Args:
        params: Tree of parameters. They may be sharded: of each ``DTensor``, every process changes its own part.
        updates: Tree of the same structure and shapes, such as a chain's ``update`` returns.

    Returns:
        A new tree like ``params``.

    Raises:
        ValueError: If the two trees differ in structure, shapes or devices; names the leaf.
        TypeError: If a leaf of ``params`` is no floating-point tensor.

    Examples:
        >>> import torch
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([1.0, -1.0])})
        {'w': tensor([2., 0.])}
    """
    check_tree(local_parts(params), "params")
    check_like(params, updates, "updates")
    return add_scaled(constant_unless(updates, params), 1.0, shard_like(params, updates))


def check_params(params: Tree, name: str, updates: Tree) -> Tree:
    """Return ``params``, constants unless the updates have derivatives; raise ``ValueError`` if it is missing."""
    if params is None:
        raise ValueError(f"{name}: params is missing; call update(updates, state, params)")
    return constant_unless(updates, params)


def check_state(state: Any, expected: type[T]) -> T:
    """Return the state, or raise ``ValueError`` if it is another transformation's."""
    if not isinstance(state, expected):
        article = "an" if expected.__name__[0] in "AEO" else "a"
        raise ValueError(
            f"state: expected {article} {expected.__name__}, got {type(state).__name__}; pass what init() or the last "
            "update() of this transformation returned"
        )
    return state


def check_evaluation(evaluation: Any, name: str) -> Evaluation:
    """Return the evaluation, or raise ``TypeError`` if it is missing or something else."""
    if evaluation is None:
        raise TypeError(
            f"{name}: evaluation is missing; call "
            "update(evaluation.grads, state, params, evaluation=evaluate(params, inputs, targets))"
        )
    if not isinstance(evaluation, Evaluation):
        raise TypeError(f"evaluation: expected an Evaluation as evaluator() makes it, got {type(evaluation).__name__}")
    return evaluation


def check_transformation(given: Any, name: str) -> None:
    """Raise ``TypeError`` unless an argument is a ``GradientTransformation``."""
    if not isinstance(given, GradientTransformation):
        raise TypeError(
            f"{name}: expected a GradientTransformation, got {type(given).__name__}; call the function that makes it, "
            "as in chain(trace(0.9), scale(-0.1))"
        )


def preconditions(state: Any) -> bool:
    """Return whether a state, or one within it, is that of a transformation that takes ``factor_damping``."""
    if getattr(state, "preconditions", False):
        return True
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, tuple | list) else ()
    return any(preconditions(part) for part in parts)
