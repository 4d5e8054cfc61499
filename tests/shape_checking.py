"""Checks the package's shape annotations while its tests run.

A function or method of ``lrkfac.core`` whose annotations name shapes, such as ``Float[Tensor, "d k"]``, is replaced
by one that checks them. The package itself does not check: users' training steps pay nothing for it.
"""

import functools
import importlib
import inspect
import pkgutil
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

# As everywhere in Python's typing, an int may be given for a float.
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))

FIRST, EVERY = 16, 8
"""The first calls of each function in a test are checked, then one of so many: a check takes as long as operations."""
_calls: Counter[FunctionType] = Counter()


def count_anew() -> None:
    """Check the next calls again, those of another test."""
    _calls.clear()


def check_shapes(package: str, checked_within: str) -> None:
    """Replaces each function with annotated shapes of the modules ``checked_within``, wherever the package holds it.

    Raises:
        RuntimeError: If there is none, that is, if the checks were off without anyone noticing.
    """
    checked: dict[FunctionType, Callable[..., Any]] = {}
    for place in _places(package):
        for name, value in list(vars(place).items()):
            if not isinstance(value, FunctionType) or not f"{value.__module__}.".startswith(f"{checked_within}."):
                continue
            if value not in checked and _has_shapes(value):
                checked[value] = _checking(value)
            if value in checked:
                setattr(place, name, checked[value])
    if not checked:
        raise RuntimeError(f"no function of {checked_within} has shapes in its annotations")


def _places(package: str) -> Iterator[ModuleType | type]:
    """All modules of the package, and their classes."""
    root = importlib.import_module(package)
    modules = [importlib.import_module(x.name) for x in pkgutil.walk_packages(root.__path__, f"{package}.")]
    for module in (root, *modules):
        yield module
        yield from [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]


def _checking(function: FunctionType) -> Callable[..., Any]:
    checked = jaxtyped(typechecker=_typechecker)(function)

    @functools.wraps(function)
    def switch(*args: Any, **kwargs: Any) -> Any:
        # The compiler cannot trace the type checker, and folds this condition into a constant.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        _calls[function] += 1
        if _calls[function] > FIRST and _calls[function] % EVERY:
            return function(*args, **kwargs)
        try:
            return checked(*args, **kwargs)
        except TypeCheckError as error:
            # Where the package refuses the argument itself, a test wants to see its words.
            raise _refusal(function, args, kwargs) or error from None

    return switch


def _refusal(function: FunctionType, args: Any, kwargs: Any) -> Exception | None:
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError) as refusal:
        return refusal
    except Exception:
        return None  # a failure of some operation inside, which says less than the check
    return None


def _has_shapes(function: FunctionType) -> bool:
    # Constructors that NamedTuple and dataclass write: trees rebuild their nodes with any leaves.
    if function.__name__ in ("__new__", "__init__"):
        return False
    return any(_is_shape(hint) for hint in inspect.get_annotations(function, eval_str=True).values())


def _is_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    # Callable[[X], Y] holds its arguments in a list.
    parts = hint if isinstance(hint, list) else typing.get_args(hint)
    return any(_is_shape(part) for part in parts)
