"""Hyperparameters in the state, where they can be read and changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.trees import counter
from lrkfac.core.base.types import Tree
from lrkfac.transforms.base import GradientTransformation, check_state, transformation
from lrkfac.transforms.rebinding import Placeholder, holders, rebound, same_hyperparameters


class HyperparametersState(NamedTuple):
    """State of ``inject_hyperparams``.

    Attributes:
        hyperparameters: By name, tensors ``[]`` in at least float32.
        inner: State of the transformation.
        steps: Number of updates so far, int64 ``[]``.
    """

    hyperparameters: dict[str, Tensor]
    inner: Any
    steps: Tensor


def inject_hyperparams(
    factory: Callable[..., GradientTransformation],
) -> Callable[..., GradientTransformation]:
    """Return a factory whose transformations keep their hyperparameters in the state.

    ``inject_hyperparams(low_rank_kfac)(layers, learning_rate=schedule, damping=1e-2, rank=16)``: a keyword argument
    that is a number, a tensor ``[]`` or a schedule becomes a hyperparameter. Positional arguments, and others, are
    fixed. So any argument that may be a tensor can follow a schedule, be changed between two steps,

        ``state._replace(hyperparameters={**state.hyperparameters, "damping": torch.tensor(1e-3)})``,

    or differ in each model of an ensemble, without a new transformation or compilation. One with a schedule is set
    anew in each step. ``rank``, which fixes the shapes of the state, cannot change: an integer is fixed. Damping and
    decay take effect at the next statistics. A value that a transformation reads only in ``init``, such as the
    damping where ``scale_by_quadratic_model`` starts, is not read again.

    The factory is called when it is injected; each step then puts the values in the place of the first ones. It is
    called in each step only inside ``torch.compile``, and where no value can be replaced: because the factory computes
    with a hyperparameter, or hides it in a closure or in an object that is no dataclass. Values that are out of range
    raise the factory's errors in ``update``, too, where a look at them costs nothing (on a CPU, not compiled).

    Args:
        factory: Such as ``low_rank_kfac`` or ``scale_by_adam``, or a custom function that returns a chain.

    Returns:
        A function of the factory's arguments that returns a transformation with a ``HyperparametersState``. It raises
        the factory's errors for them, and the following.

    Raises:
        ValueError: If ``rank`` is to change; in ``update``, if the state or the names in it are another's.
        TypeError: If ``factory`` does not make a ``GradientTransformation``, if a function is no schedule, or there is
            no hyperparameter.

    Examples:
        >>> import lrkfac
        >>> tx = inject_hyperparams(lrkfac.scale)(factor=2.0)
        >>> state = tx.init(torch.zeros(1))
        >>> state = state._replace(hyperparameters={"factor": torch.tensor(3.0)})
        >>> tx.update(torch.ones(1), state)[0]
        tensor([3.])
    """
    if isinstance(factory, GradientTransformation) or not callable(factory):
        raise TypeError(
            f"factory: expected a function that makes a GradientTransformation, such as low_rank_kfac, got "
            f"{type(factory).__name__}; leave the call to the result: inject_hyperparams(trace)(decay=0.9)"
        )
    return _Injector(factory)


@dataclass(frozen=True)
class _Injector:
    """The function that ``inject_hyperparams`` returns."""

    factory: Callable[..., GradientTransformation]

    def __call__(self, *args: Any, **options: Any) -> GradientTransformation:
        variable = {name: value for name, value in options.items() if name != "rank" and _may_change(value)}
        fixed = {name: value for name, value in options.items() if name not in variable}
        if isinstance(fixed.get("rank"), Tensor) or callable(fixed.get("rank")):
            raise ValueError(
                "rank: expected a fixed integer, got a tensor or a schedule; it fixes the shapes of the state, so it "
                "cannot change"
            )
        if not variable:
            raise TypeError(
                "inject_hyperparams: expected a number, a tensor [] or a schedule by keyword, such as "
                f"learning_rate=0.1, got {list(options) or 'none'}"
            )
        injected = InjectHyperparams(self.factory, args, fixed, variable)
        start = torch.zeros((), dtype=torch.int64, device="cpu")
        injected.made({name: _first(name, value, start) for name, value in variable.items()})
        injected.made(injected.values(start, torch.float64, {}))
        return transformation(injected)


class _Template(NamedTuple):
    """A transformation made with placeholders; see ``rebinding``."""

    transformation: GradientTransformation
    placeholders: dict[str, Placeholder]
    holding: set[int] | None


def rebound_to(template: _Template, values: dict[str, Tensor]) -> GradientTransformation:
    """Return the template's transformation with these values."""
    placed = {id(template.placeholders[name]): value for name, value in values.items()}
    made: GradientTransformation = rebound(template.transformation, placed, template.holding or set())
    return made


@dataclass(frozen=True, eq=False)
class InjectHyperparams:
    """See ``inject_hyperparams``.

    Attributes:
        factory: Makes the transformation.
        args: Its positional arguments.
        fixed: Its keyword arguments that stay the same.
        variable: Its keyword arguments that are hyperparameters, as they were passed.
    """

    factory: Callable[..., GradientTransformation]
    args: tuple[Any, ...]
    fixed: dict[str, Any]
    variable: dict[str, Any]

    def init(self, params: Tree) -> HyperparametersState:
        """Return the first values and the state of the transformation with them."""
        check_tree(params, "params")
        steps = counter(params)
        values = self.values(steps, _dtype(params), {})
        return HyperparametersState(values, self._with(values).init(params), steps)

    def update(
        self, updates: Tree, state: HyperparametersState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, HyperparametersState]:
        """Update with the values of this step."""
        check_tree(updates, "updates")
        check_state(state, HyperparametersState)
        if state.hyperparameters.keys() != self.variable.keys():
            raise ValueError(
                f"hyperparameters: expected {sorted(self.variable)}, got {sorted(state.hyperparameters)}; others are "
                "fixed where the transformation is made, rank always"
            )
        values = self.values(state.steps, _dtype(updates), state.hyperparameters)
        changed, inner = self._with(values).update(updates, state.inner, params, **extra)
        return changed, HyperparametersState(values, inner, state.steps + 1)

    def values(self, steps: Tensor, dtype: torch.dtype, current: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all hyperparameters at a step: schedules anew, others as in the state."""
        values = {name: x(steps) if callable(x) else current.get(name, x) for name, x in self.variable.items()}
        return {name: _tensor(name, value, dtype, steps.device) for name, value in values.items()}

    def made(self, hyperparameters: dict[str, Any]) -> GradientTransformation:
        """Return the factory's transformation."""
        made = self.factory(*self.args, **self.fixed, **hyperparameters)
        if not isinstance(made, GradientTransformation):
            raise TypeError(f"factory: expected one of a GradientTransformation, got {type(made).__name__} from it")
        return made

    def _with(self, values: dict[str, Tensor]) -> GradientTransformation:
        """Return the transformation with these values."""
        if torch.compiler.is_compiling():
            return self.made(values)
        if self._template.holding is None:
            return self.made(values)
        return rebound_to(self._template, values)

    @cached_property
    def _template(self) -> _Template:
        start = torch.zeros((), dtype=torch.int64, device="cpu")
        values = self.values(start, torch.float64, {})
        placeholders = {name: Placeholder.like(value) for name, value in values.items()}
        made = self.made(placeholders)
        template = _Template(made, placeholders, holders(made, {id(x): x for x in placeholders.values()}))
        return template if self._agrees(template, values) else template._replace(holding=None)

    def _agrees(self, template: _Template, values: dict[str, Tensor]) -> bool:
        """Return whether other values reach all that the factory makes of them, such as ``torch.tensor(value)``."""
        if template.holding is None:
            return True
        others = {name: 0.5 * value + 0.25 for name, value in values.items()}  # in [0, 1) where the value is
        try:
            expected = self.made(others)
            return same_hyperparameters(rebound_to(template, others), expected)
        except (ValueError, TypeError):
            return False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_template"}


def _may_change(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return callable(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def _first(name: str, value: Any, start: Tensor) -> float | Tensor:
    """Return a hyperparameter at step 0."""
    if not callable(value):
        return value
    try:
        value = value(start)
    except Exception as error:
        raise TypeError(_NO_SCHEDULE.format(name=name, got=f"{type(error).__name__}: {error}")) from error
    if callable(value) or not _may_change(value):
        raise TypeError(_NO_SCHEDULE.format(name=name, got=type(value).__name__))
    return value


_NO_SCHEDULE = (
    "{name}: expected a schedule, a function of the step that returns a number or a tensor [], got {got}; pass "
    "fixed arguments by position"
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
