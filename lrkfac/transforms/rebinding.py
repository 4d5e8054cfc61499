"""Replace the hyperparameters of a transformation, so that no step has to call the function that makes it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import optree
from torch import Tensor

from lrkfac.transforms.base import GradientTransformation

READ = frozenset({"ndim", "dtype", "device", "shape", "requires_grad", "is_complex", "is_floating_point", "dim"})
"""Attributes of a placeholder that may be read before it has a value."""


class Placeholder(Tensor):
    """A tensor ``[]`` that stands for a hyperparameter while a transformation is made.

    It passes through constructors unchanged. ``computed`` says whether something else was computed from it, which no
    later value would reach.
    """

    computed = False

    @classmethod
    def like(cls, value: Tensor) -> Placeholder:
        """Return a placeholder with the value of a tensor."""
        return value.detach().clone().as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property such as Tensor.ndim
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in READ:
            for x in optree.tree_leaves((args, kwargs)):
                if isinstance(x, Placeholder):
                    x.computed = True
        return super().__torch_function__(func, types, args, kwargs or {})

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone()


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
        _search(transformation, placeholders, holding, {})
    except OpaqueError:
        return None
    reached = all(i in holding for i in placeholders)
    return holding if reached and not any(x.computed for x in placeholders.values()) else None


def same_hyperparameters(one: Any, other: Any) -> bool:
    """Return whether two transformations of one factory hold equal numbers and tensors wherever they hold any."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, GradientTransformation):
        one, other = getattr(one.init, "__self__", None), getattr(other.init, "__self__", None)
    if type(one) is not type(other):
        return False
    if is_dataclass(one) and not isinstance(one, type):
        return all(same_hyperparameters(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_hyperparameters(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_hyperparameters, one, other))
    return bool(one == other) if isinstance(one, bool | int | float) else True


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
    parts = [rebound(part, values, holding) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)


def _search(x: Any, placeholders: dict[int, Placeholder], holding: set[int], seen: dict[int, bool]) -> bool:
    """Add the identities of all objects within ``x`` that hold a placeholder; return whether it does."""
    if id(x) in placeholders:
        holding.add(id(x))
        return True
    if id(x) in seen or isinstance(x, Tensor):
        return seen.get(id(x), False)
    seen[id(x)] = False  # while its parts are searched, which may refer to it
    parts, replaceable = _parts(x)
    # All parts, not only those up to the first that holds one.
    holds = any([_search(part, placeholders, holding, seen) for part in parts])
    if holds and not replaceable:
        raise OpaqueError
    if holds:
        holding.add(id(x))
        seen[id(x)] = True
    return holds


def _parts(x: Any) -> tuple[list[Any], bool]:
    """Return the objects that an object consists of, and whether ``rebound`` can put others in their place."""
    if isinstance(x, GradientTransformation):
        link = getattr(x.init, "__self__", None)
        bound = x.init == getattr(link, "init", None) and x.update == getattr(link, "update", None)
        return ([link], True) if is_dataclass(link) and bound else (list(x), False)
    if isinstance(x, type | ModuleType):
        return [], False
    if is_dataclass(x):
        return [getattr(x, f.name) for f in fields(x)], all(f.init for f in fields(x))
    if isinstance(x, dict):
        return list(x.values()), type(x) is dict
    if isinstance(x, list | tuple):
        return list(x), type(x) in (list, tuple) or hasattr(x, "_fields")
    if isinstance(x, FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if cell != _EMPTY]
        return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()], False
    if isinstance(x, MethodType):
        return [x.__self__, x.__func__], False
    if isinstance(x, partial):
        return [x.func, *x.args, *x.keywords.values()], False
    if isinstance(x, set | frozenset):
        return list(x), False
    return list(getattr(x, "__dict__", {}).values()), False


_EMPTY = CellType()
"""A closure's variable before its first value."""
