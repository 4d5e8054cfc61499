"""Hyperparameters in the state, where they can be read and changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import counter
from lrkfac.core.base.types import Tree
from lrkfac.transforms.base import GradientTransformation, check_state


class HyperparametersState(NamedTuple):
    """``hyperparameters``: by name, tensors ``[]`` in at least float32; ``inner``: the state of the transformation;
    ``steps``: the number of updates so far, int64 ``[]``.
    """

    hyperparameters: dict[str, Tensor]
    inner: Any
    steps: Tensor


def inject_hyperparams(
    factory: Callable[..., GradientTransformation],
) -> Callable[..., GradientTransformation]:
    """The factory of a transformation whose hyperparameters stand in its state.

    ``inject_hyperparams(low_rank_kfac)(layers, learning_rate=schedule, damping=1e-2, rank=16)``: what is given by
    keyword and is a number, a tensor ``[]`` or a schedule becomes a hyperparameter; what is given by position, and
    what is neither, is passed on as it is. So any argument that may be a tensor can follow a schedule, be changed
    between two steps,

        ``state._replace(hyperparameters={**state.hyperparameters, "damping": torch.tensor(1e-3)})``,

    or differ in each model of an ensemble, without a new transformation or compilation. One with a schedule is set
    anew in each step, whatever it was. ``rank``, which fixes the shapes of the state, cannot change: an integer is
    passed on. Damping and decay take effect at the next statistics. What a transformation reads in ``init`` alone,
    such as the damping where ``scale_by_quadratic_model`` starts, is not read again. Outside ``torch.compile`` each
    step makes the transformation again, about 0.4 ms for each layer of ``low_rank_kfac``.

    Args:
        factory: Such as ``low_rank_kfac`` or ``scale_by_adam``, or one's own function that returns a chain.

    Returns:
        The function that takes the factory's arguments. It raises what the factory does for these, and

    Raises:
        ValueError: If ``rank`` is to change; in ``update``, if the state or the names in it are another's.
        TypeError: If ``factory`` does not make a ``GradientTransformation``, if a function is no schedule, or there is
            no hyperparameter.
    """
    if isinstance(factory, GradientTransformation) or not callable(factory):
        raise TypeError(
            f"factory: expected a function that makes a GradientTransformation, such as low_rank_kfac, got "
            f"{type(factory).__name__}; leave the call to the result: inject_hyperparams(trace)(decay=0.9)"
        )

    def make(*args: Any, **options: Any) -> GradientTransformation:
        given = {name: value for name, value in options.items() if name != "rank" and _may_change(value)}
        fixed = {name: value for name, value in options.items() if name not in given}
        if isinstance(fixed.get("rank"), Tensor) or callable(fixed.get("rank")):
            raise ValueError(
                "rank: expected a fixed integer, got a tensor or a schedule; it fixes the shapes of the state, so it "
                "cannot change"
            )
        if not given:
            raise TypeError(
                "inject_hyperparams: expected a number, a tensor [] or a schedule by keyword, such as "
                f"learning_rate=0.1, got {list(options) or 'none'}"
            )

        def transformation(hyperparameters: dict[str, Any]) -> GradientTransformation:
            found = factory(*args, **fixed, **hyperparameters)
            if not isinstance(found, GradientTransformation):
                raise TypeError(
                    f"factory: expected one of a GradientTransformation, got {type(found).__name__} from it"
                )
            return found

        def values(steps: Tensor, dtype: torch.dtype, held: dict[str, Tensor]) -> dict[str, Tensor]:
            found = {name: one(steps) if callable(one) else held.get(name, one) for name, one in given.items()}
            return {name: _tensor(name, value, dtype, steps.device) for name, value in found.items()}

        start = torch.zeros((), dtype=torch.int64)
        first = {name: _first(name, one, start) for name, one in given.items()}
        transformation(first)
        transformation(values(start, torch.float64, {}))

        def init(params: Tree) -> HyperparametersState:
            check_tree(params, "params")
            steps = counter(params)
            found = values(steps, _dtype(params), {})
            return HyperparametersState(found, transformation(found).init(params), steps)

        def update(
            updates: Tree, state: HyperparametersState, params: Tree = None, **extra: Any
        ) -> tuple[Tree, HyperparametersState]:
            check_tree(updates, "updates")
            check_state(state, HyperparametersState)
            if state.hyperparameters.keys() != given.keys():
                raise ValueError(
                    f"hyperparameters: expected {sorted(given)}, got {sorted(state.hyperparameters)}; others are fixed "
                    "where the transformation is made, rank always"
                )
            found = values(state.steps, _dtype(updates), state.hyperparameters)
            changed, inner = transformation(found).update(updates, state.inner, params, **extra)
            return changed, HyperparametersState(found, inner, state.steps + 1)

        return GradientTransformation(init, update)

    return make


def _may_change(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return callable(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def _first(name: str, given: Any, start: Tensor) -> float | Tensor:
    """A hyperparameter at step 0, as it is given."""
    if not callable(given):
        return given
    try:
        value = given(start)
    except Exception as error:
        raise TypeError(_NO_SCHEDULE.format(name=name, got=f"{type(error).__name__}: {error}")) from error
    if callable(value) or not _may_change(value):
        raise TypeError(_NO_SCHEDULE.format(name=name, got=type(value).__name__))
    return value


_NO_SCHEDULE = (
    "{name}: expected a schedule, a function of the step that returns a number or a tensor [], got {got}; give by "
    "position what is passed on as it is"
)


def _tensor(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.ndim:
        raise ValueError(f"{name}: expected a number or a tensor [], got the shape {tuple(value.shape)}")
    return value.to(dtype=dtype, device=device)


def _dtype(tree: Tree) -> torch.dtype:
    leaves = optree.tree_leaves(tree)
    return torch.promote_types(leaves[0].dtype, torch.float32) if leaves else torch.float32
