"""Checks the package's shape annotations while its tests run.

A function of ``lrkfac.core`` whose annotations name shapes, such as ``Float[Tensor, "d k"]``, is replaced
by one that checks them. The package itself does not check: users' training steps pay nothing for it.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

# As everywhere in Python's typing, an int may be given for a float.
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_shapes(package: str, checked_within: str) -> list[str]:
    """Replaces each function with annotated shapes, wherever the package holds it.

    Args:
        package: Name of the package; all its modules are imported.
        checked_within: Prefix of the names of the modules whose functions are to be checked.

    Returns:
        The qualified names of the functions that are checked from now on.

    Raises:
        RuntimeError: If there is none, that is, if the checks were off without anyone noticing.
    """
    modules = list(_modules(package))
    places = [place for module in modules for place in (module, *_classes(module))]
    checked: dict[FunctionType, Callable[..., Any]] = {}
    for place in places:
        for name, value in list(vars(place).items()):
            for function in _functions(value):
                inside = f"{function.__module__}.".startswith(f"{checked_within}.")
                if inside and function not in checked and _has_shapes(function):
                    checked[function] = _checking(function)
            replacement = _replaced(value, checked)
            if replacement is not value:
                setattr(place, name, replacement)
    if not checked:
        raise RuntimeError(f"no function of {checked_within} has shapes in its annotations")
    return sorted(f"{function.__module__}.{function.__qualname__}" for function in checked)


def _checking(function: FunctionType) -> Callable[..., Any]:
    checked = jaxtyped(typechecker=_typechecker)(function)

    @functools.wraps(function)
    def switch(*args: Any, **kwargs: Any) -> Any:
        # The compiler cannot trace the type checker, and folds this condition into a constant.
        if torch.compiler.is_compiling():
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


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(f"{package}."):
            yield module


def _classes(module: ModuleType) -> list[type]:
    return [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]


def _functions(value: object) -> list[FunctionType]:
    if isinstance(value, property):
        accessors = [value.fget, value.fset, value.fdel]
    else:
        accessors = [value.__func__ if isinstance(value, classmethod | staticmethod) else value]
    return [x for x in accessors if isinstance(x, FunctionType)]


def _replaced(value: Any, checked: dict[FunctionType, Callable[..., Any]]) -> Any:
    if not any(function in checked for function in _functions(value)):
        return value
    if isinstance(value, property):
        accessors = [checked.get(x, x) for x in (value.fget, value.fset, value.fdel)]
        return property(*accessors, doc=value.__doc__)
    if isinstance(value, classmethod | staticmethod):
        return type(value)(checked[value.__func__])
    return checked[value]


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
