"""What stands in the ``param_groups`` of an optimizer, as arguments of the function that makes a chain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.private_torch import required_option
from lrkfac.core.base.types import PerParameter
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.module import from_module
from lrkfac.transforms.base import GradientTransformation

Group = dict[str, Any]

OF_GROUPS = ("momentum", "weight_decay")
"""Options of a chain that may differ between groups, as ``lr`` may; all others concern the curvature or whole steps."""

NOTES = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
"""What else stands in a group: parameters, names, and what schedulers note for themselves."""


def defaults(
    transformation: Callable[..., GradientTransformation], lr: float | Tensor | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What stands in a group unless it says otherwise: ``lr``, and the options of ``OF_GROUPS`` that there are."""
    try:
        known = dict(inspect.signature(transformation).parameters)
    except (TypeError, ValueError):  # not every callable tells
        known = {}
    own = {name: known[name].default for name in OF_GROUPS if name in known} | dict(options)
    found = {name: own[name] for name in OF_GROUPS if name in own and own[name] is not inspect.Parameter.empty}
    return found if lr is None else {"lr": lr, **found}


def check_group(group: Group, module: nn.Module, known: Collection[str]) -> None:
    """Refuses a group of other parameters, or that sets what groups cannot.

    Args:
        group: As ``torch.optim`` holds it.
        module: Whose parameters they are.
        known: What a group may set.

    Raises:
        ValueError: If a parameter is not the module's, or requires no gradient; if something else is set, or ``lr`` is
            out of range.
        TypeError: If ``lr`` is no number.
    """
    named = {id(p): name for name, p in module.named_parameters()}
    if not group["params"]:
        raise ValueError("params: expected parameters in each group, got one with none; is its generator used up?")
    strangers = [i for i, p in enumerate(group["params"]) if id(p) not in named]
    if strangers:
        raise ValueError(f"params: expected parameters of the module, got others at the places {strangers} of a group")
    frozen = [named[id(p)] for p in group["params"] if not p.requires_grad]
    if frozen:
        raise ValueError(f"params: {frozen} require no gradient; call requires_grad_() on them, or leave them out")
    others = [name for name in group if name not in NOTES and name not in known]
    if others:
        raise ValueError(
            f"params: a group sets {others}, and only {list(known)} may differ between groups; what concerns the "
            "curvature is for all parameters: give it to the optimizer, or make a chain with partition() of your own"
        )
    if "lr" in known:
        check_number(group["lr"], "lr", 0)


def listed(params: Any) -> list[Any]:
    """Parameters, or groups of them, as a list.

    Raises:
        ValueError: If there are none.
        TypeError: If they are something else.
    """
    if not isinstance(params, Iterable) or isinstance(params, Tensor | str | Mapping):
        raise TypeError(
            f"params: expected parameters, or dictionaries of groups, in an iterable, got {type(params).__name__}"
        )
    found = list(params)
    if not found:
        raise ValueError("params: expected at least one parameter, got none")
    return found


def filled(group: Any, defaults: Mapping[str, Any]) -> Group:
    """A copy of a group with what it does not say; tensors, which change in place, are its own.

    Raises:
        ValueError: If it has no parameters.
        TypeError: If it is no dictionary.
    """
    if not isinstance(group, dict):
        raise TypeError(
            f"param_group: expected a dictionary of params and what holds for them, got {type(group).__name__}"
        )
    if "params" not in group:
        raise ValueError(f"param_group: expected params in it, got {list(group)}")
    own = {
        name: x.clone() if isinstance(x, Tensor) else x for name, x in defaults.items() if x is not required_option()
    }
    return {**own, **group}


def function_of(
    module: nn.Module, groups: Sequence[Group], buffers: bool
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The module as a function of the parameters in the groups, and these."""
    model, params, *_ = from_module(module, buffers=buffers)
    ids = {id(p) for group in groups for p in group["params"]}
    own = {name for name, p in module.named_parameters() if id(p) in ids}
    constant = {name: x for name, x in params.items() if name not in own}
    function = (lambda params, inputs: model({**constant, **params}, inputs)) if constant else model
    return function, {name: x for name, x in params.items() if name in own}


def check_module(
    module: nn.Module, parameters: Mapping[str, Tensor], modes: Sequence[tuple[str, nn.Module, bool]]
) -> None:
    """Refuses a module that is another function by now than the one that was described.

    Raises:
        ValueError: If a part is in another mode, or a parameter has been replaced or frozen.
    """
    for name, part, training in modes:
        if part.training != training:
            was, now = ("train", "eval") if training else ("eval", "train")
            raise ValueError(
                f"module: {name or type(part).__name__!r} is in {now} mode, and was in {was} mode when the "
                f"optimizer was made; call {was}() on it, or make the optimizer again"
            )
    there = dict(module.named_parameters())
    gone = [name for name, p in parameters.items() if there.get(name) is not p or not p.requires_grad]
    if gone:
        raise ValueError(
            f"module: {gone} have been replaced or frozen since the optimizer was made; make the optimizer again"
        )


class OfGroups:
    """Makes the chain with what stands in the groups; ``lr`` is read by the chain, in each step.

    Args:
        groups: Returns those of the optimizer.
        make: ``make(layers, [lr], **options)``.
        known: What stands in each group.
    """

    def __init__(
        self, groups: Callable[[], list[Group]], make: Callable[..., GradientTransformation], known: Collection[str]
    ) -> None:
        self.groups, self.make = groups, make
        self.has_rate, self.names = "lr" in known, [name for name in OF_GROUPS if name in known]
        self.used: list[list[Any]] = []

    def __call__(self, layers: Layers, parameters: Mapping[str, Tensor]) -> GradientTransformation:
        """The chain for the layers of all parameters in the groups, which are given by name.

        Raises:
            TypeError: If the function makes something else.
        """
        groups, now = self.groups(), self._values()
        names = {id(p): name for name, p in parameters.items()}

        def of_parameters(values: Sequence[Any]) -> PerParameter:
            """A tree like the parameters, or what is the same for all of them."""
            if all(_is_same(value, values[0]) for value in values):
                return values[0]
            return {names[id(p)]: value for group, value in zip(groups, values, strict=True) for p in group["params"]}

        rates = [of_parameters([partial(self._rate, i) for i in range(len(groups))])] if self.has_rate else []
        options = {name: of_parameters(values) for name, values in zip(self.names, now, strict=True)}
        found = self.make(layers, *rates, **options)
        if not isinstance(found, GradientTransformation):
            raise TypeError(
                "transformation: expected a function that makes a GradientTransformation, such as kfac, got one of "
                f"{type(found).__name__}"
            )
        self.used = now
        return found

    def has_changed(self) -> bool:
        """Whether the groups have other values now, the learning rate apart."""
        pairs = zip(chain.from_iterable(self._values()), chain.from_iterable(self.used), strict=True)
        return not all(_is_same(*pair) for pair in pairs)

    def _values(self) -> list[list[Any]]:
        return [[group[name] for group in self.groups()] for name in self.names]

    def _rate(self, group: int, step: Tensor) -> float | Tensor:
        rate: float | Tensor = self.groups()[group]["lr"]
        return rate


def _is_same(one: Any, other: Any) -> bool:
    """Whether two hyperparameters are the same, now and later: tensors may change in place."""
    return one is other or (not (isinstance(one, Tensor) or isinstance(other, Tensor)) and bool(one == other))
