"""Transformations with other values of their hyperparameters, without a call of the function that makes them."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from lrkfac.transforms.base import GradientTransformation

READ = frozenset({"ndim", "dtype", "device", "shape", "requires_grad", "is_complex", "is_floating_point", "dim"})
"""Attributes of a placeholder that may be read before it has a value."""


class Placeholder(Tensor):
    """A tensor ``[]`` that stands for a hyperparameter while a transformation is made.

    It passes through constructors unchanged. ``computed`` says whether something else was computed from it, which no
    later value would reach.
    """

    computed: bool

    @classmethod
    def like(cls, value: Tensor) -> Placeholder:
        """Return a placeholder with the value of a tensor."""
        placeholder = value.detach().clone().as_subclass(cls)
        placeholder.computed = False
        return placeholder

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property such as Tensor.ndim
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in READ:
            for x in args:
                if isinstance(x, Placeholder):
                    x.computed = True
        return super().__torch_function__(func, types, args, kwargs or {})


class OpaqueError(Exception):
    """Raised where a transformation cannot be looked into."""


def holders(transformation: GradientTransformation, placeholders: dict[int, Placeholder]) -> set[int] | None:
    """Return the identities of all objects within a transformation that hold a placeholder.

    Args:
        transformation: As made with the placeholders.
        placeholders: By identity.

    Returns:
        The identities, or ``None`` where later values would not reach everything: something was computed from a
        placeholder, or a function that is no method of a dataclass may hold one.
    """
    holding: set[int] = set()
    try:
        _search(transformation, placeholders, holding)
    except OpaqueError:
        return None
    reached = all(i in holding for i in placeholders)
    return holding if reached and not any(x.computed for x in placeholders.values()) else None


def rebound(x: Any, values: dict[int, Any], holding: set[int]) -> Any:
    """Return an object with values in the place of placeholders.

    Args:
        x: The transformation, or a part of it.
        values: By the identity of their placeholders.
        holding: From ``holders``.
    """
    if id(x) in values:
        return values[id(x)]
    if id(x) not in holding:
        return x
    if isinstance(x, GradientTransformation):
        link = rebound(x.init.__self__, values, holding)  # type: ignore[attr-defined]
        return GradientTransformation(link.init, link.update)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: rebound(getattr(x, f.name), values, holding) for f in fields(x)})
    if isinstance(x, dict):
        return {key: rebound(value, values, holding) for key, value in x.items()}
    return type(x)(rebound(one, values, holding) for one in x)


def _search(x: Any, placeholders: dict[int, Placeholder], holding: set[int]) -> bool:
    """Add the identities of all objects within ``x`` that hold a placeholder; return whether it does."""
    if id(x) in placeholders:
        holding.add(id(x))
        return True
    parts: list[Any]
    if isinstance(x, Tensor):
        return False
    if isinstance(x, GradientTransformation):
        link = getattr(x.init, "__self__", None)
        if not is_dataclass(link) or getattr(x.update, "__self__", None) is not link:
            raise OpaqueError
        parts = [link]
    elif is_dataclass(x) and not isinstance(x, type):
        parts = [getattr(x, f.name) for f in fields(x)]
    elif isinstance(x, dict):
        parts = list(x.values())
    elif isinstance(x, list | tuple):
        parts = list(x) if type(x) in (list, tuple) else []
    else:
        if isinstance(x, partial) or (isinstance(x, types.FunctionType) and x.__closure__):
            raise OpaqueError
        return False
    holds = any([_search(part, placeholders, holding) for part in parts])  # all of them, one after another
    if holds:
        holding.add(id(x))
    return holds
