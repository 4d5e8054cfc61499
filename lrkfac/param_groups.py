"""The ``param_groups`` of an optimizer as arguments of the function that makes a chain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any, Protocol

from torch import Tensor, nn

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.types import PerParameter
from lrkfac.core.layers.description import Layers
from lrkfac.transforms.base import GradientTransformation


class Group(dict[str, Any]):
    """A group of parameters with its hyperparameters; says what to do where a scheduler asks for a rate it has not."""

    def __missing__(self, key: str) -> Any:
        if key == "lr":
            raise TypeError(
                "lr: the optimizer was made without, so there is none for a scheduler to change; "
                "adaptive_low_rank_kfac finds its step sizes in each step and needs no scheduler, low_rank_kfac and "
                "kfac take lr="
            )
        raise KeyError(key)


PER_GROUP = ("momentum", "weight_decay")
"""Options of a chain that may differ between groups, as ``lr`` may; all others concern the curvature or whole steps."""

BOOKKEEPING = (
    "params",
    "param_names",
    "name",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
    "swa_lr",
)
"""Other entries of a group: parameters, names, and what schedulers note for themselves."""


class HasGroups(Protocol):
    """An optimizer, as far as the chain reads it."""

    param_groups: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class GroupRate:
    """Schedule that returns the learning rate of one group, whatever the step."""

    optimizer: HasGroups
    index: int

    def __call__(self, step: Tensor) -> float | Tensor:
        return checked_rate(self.optimizer.param_groups[self.index]["lr"])


class ChainFactory:
    """Makes the chain from the values of all groups; it reads ``lr`` in each step.

    Args:
        optimizer: Whose groups are read.
        make: ``make(layers, [lr], **options)``.
        known: Names of the options that each group sets.
    """

    def __init__(
        self, optimizer: HasGroups, make: Callable[..., GradientTransformation], known: Collection[str]
    ) -> None:
        self.optimizer, self.make = optimizer, make
        self.known, self.names = tuple(known), [name for name in PER_GROUP if name in known]
        self.used: list[list[Any]] = []
        self.layers: list[str] = []

    def __call__(self, layers: Layers, parameters: Mapping[str, Tensor]) -> GradientTransformation:
        """Return the chain for the layers of all parameters in the groups; ``parameters`` maps their names to them.

        Raises:
            TypeError: If the function makes something else.
            ValueError: If layers are divided among processes, and others than before.
        """
        layer_names = [layer.name for layer in layers]
        if self.used and layer_names != self.layers and getattr(self.make, "keywords", {}).get("owners") is not None:
            raise ValueError(
                "owners: expected the layers that the optimizer was made with, got others, as by add_param_group(): "
                "layers would pass to processes that do not have their averages; make the optimizer anew with all "
                "groups, or leave owners= out"
            )
        names = {id(p): name for name, p in parameters.items()}
        values = self._values()
        rates = [GroupRate(self.optimizer, i) for i in range(len(self.optimizer.param_groups))]
        positional = [self._per_parameter(rates, names)] if "lr" in self.known else []
        options = {name: self._per_parameter(of, names) for name, of in zip(self.names, values, strict=True)}
        transformation = self.make(layers, *positional, **options)
        if not isinstance(transformation, GradientTransformation):
            raise TypeError(
                "transformation: expected a function that makes a GradientTransformation, such as kfac, got one of "
                f"{type(transformation).__name__}"
            )
        self.used, self.layers = values, layer_names
        return transformation

    def has_changed(self) -> bool:
        """Return whether the groups have other values than the chain was made with, the learning rate apart."""
        pairs = zip(chain.from_iterable(self._values()), chain.from_iterable(self.used), strict=True)
        return not all(_is_same(*pair) for pair in pairs)

    def _values(self) -> list[list[Any]]:
        """Return the value of each group, for each option."""
        return [[group[name] for group in self.optimizer.param_groups] for name in self.names]

    def _per_parameter(self, values: Sequence[Any], names: Mapping[int, str]) -> PerParameter:
        """Return a tree like the parameters, or the one value that all groups share."""
        if all(_is_same(value, values[0]) for value in values):
            return values[0]
        groups = zip(self.optimizer.param_groups, values, strict=True)
        return {names[id(p)]: value for group, value in groups for p in group["params"]}


def plain_rate(rate: Any) -> Any:
    """Return a NumPy scalar as a number, and anything else as it is."""
    is_plain = isinstance(rate, int) or type(rate) is float
    return float(rate) if isinstance(rate, Real) and not is_plain else rate


def checked_rate(rate: Any) -> float | Tensor:
    """Return a learning rate as a number or tensor ``[]``; a NumPy scalar or a tensor of one entry is one, too.

    Raises:
        ValueError: If it is out of range.
        TypeError: If it is no number.
    """
    if isinstance(rate, Tensor) and rate.ndim and rate.numel() == 1:
        rate = rate.reshape(())
    rate = plain_rate(rate)
    check_number(rate, "lr", 0)
    return rate


def with_defaults(group: Any, defaults: Mapping[str, Any]) -> Group:
    """Return a copy of a group, completed by copies of the defaults: tensors may change in place.

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
    copies = {name: x.clone() if isinstance(x, Tensor) else x for name, x in defaults.items()}
    return Group({**copies, **group, **({"lr": plain_rate(group["lr"])} if "lr" in group else {})})


def check_group(group: Mapping[str, Any], module: nn.Module, known: Collection[str]) -> None:
    """Raise unless a group has trainable parameters of the module, and sets only what groups can.

    Args:
        group: As ``torch.optim`` stores it.
        module: Whose parameters they are.
        known: Names of the options that a group may set; each is in the group or has a default.

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
    others = [name for name in group if name not in BOOKKEEPING and name not in known]
    if others:
        raise ValueError(
            f"params: a group sets {others}, and only {list(known)} may differ between groups; what concerns the "
            "curvature is for all parameters: give it to the optimizer, or make a custom chain with partition()"
        )
    missing = [name for name in known if name not in group]
    if missing:
        raise ValueError(f"params: a group sets no {missing}, and the optimizer was made without; set it in each group")
    if "lr" in known:
        checked_rate(group["lr"])


def parameters_of(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """Return the parameters in the groups by name, in the order of the module."""
    ids = {id(p) for group in groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if id(p) in ids}


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two hyperparameters are the same, now and later: tensors may change in place."""
    return one is other or (not (isinstance(one, Tensor) or isinstance(other, Tensor)) and bool(one == other))
