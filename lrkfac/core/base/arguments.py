"""Checks of single arguments, all with the same message: ``name: expected ..., got ...``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.eager import has_values
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.tree_checks import check_whole


def check_number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, includes_low: bool = True
) -> None:
    """Raise unless ``value`` is a finite real number, or tensor ``[]``, in the interval.

    The interval is ``[low, high)``, or ``(low, high)`` without ``includes_low``. The value of a tensor is checked only
    where reading it costs nothing.

    Raises:
        ValueError: If the number is out of range, or a tensor has another shape or is on the device "meta".
        TypeError: If it is no real number.
    """
    number = value
    if isinstance(value, Tensor):
        check_scalar(value, name)
        if not has_values(value):
            return
        number = value.item()
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    above = number >= low if includes_low else number > low
    # An integer may be larger than any float.
    if not (abs(number) < math.inf and above and number < high):
        bracket = "[" if includes_low and low > -math.inf else "("
        raise ValueError(f"{name}: expected a finite number in {bracket}{low}, {high}), got {_short(number)}")


def check_scalar(value: Tensor, name: str) -> None:
    """Raise unless a tensor is a real number ``[]`` with a value."""
    if value.ndim:
        raise ValueError(f"{name}: expected a number or a tensor [], got the shape {tuple(value.shape)}")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a number, got a tensor of {value.dtype}")
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected a number, got a tensor on the device 'meta', which has no value")


def check_integer(value: Any, name: str, low: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer >= {low}, got {_short(value)}")
    if value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value}")


def check_choice(value: Any, name: str, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of the names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {_short(value)}")


def check_flag(value: Any, name: str) -> None:
    """Raise unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_short(value)}")


def check_dtype(value: Any, name: str = "dtype") -> None:
    """Raise unless ``value`` is a dtype that factors can have."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected torch.float32 or torch.float64, got {_short(value)}")
    if value not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: expected torch.float32 or torch.float64, got {value}; torch has no QR, eigh or Cholesky of other "
            "real numbers, and eigenvalues of factors span more than half precision can tell apart"
        )


def check_function(value: Any, name: str, what: str = "a function") -> Callable[..., Any]:
    """Return ``value``; raise unless it can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    return value


def check_model(value: Any, name: str = "model") -> Callable[..., Any]:
    """Return ``value``; raise unless it can be a function of parameters and inputs, which a module is not."""
    if isinstance(value, torch.nn.Module) and next(value.parameters(), None) is not None:
        raise TypeError(
            f"{name}: expected a function {name}(params, inputs), got the module {type(value).__name__}; make one of "
            f"it: {name}, params = from_module(module)"
        )
    return check_function(value, name, f"a function {name}(params, inputs)")


def check_values(**trees: Any) -> None:
    """Raise if a tree has a tensor on the device "meta", or a ``DTensor``."""
    for name, tree in trees.items():
        leaves = tree_leaves(tree)
        check_whole(tree, leaves, name)
        if any(isinstance(x, Tensor) and x.device.type == "meta" for x in leaves):
            raise ValueError(f"{name}: expected tensors with values, got one on the device 'meta'")


def check_target_range(name: str, targets: Tensor, low: float, high: float) -> None:
    """Raise if a target is outside the interval, where values are known.

    Targets that are not a number pass: the loss then shows them.
    """
    if not has_values(targets) or not targets.numel():
        return
    smallest, largest = targets.aminmax()
    if smallest < low or largest > high:
        raise ValueError(
            f"{name}: expected targets in [{low:g}, {high:g}], got some from {smallest.item():g} to {largest.item():g}"
        )


def check_target_dtype(name: str, targets: Tensor) -> None:
    """Raise unless targets are floating-point numbers."""
    if not targets.is_floating_point():
        raise TypeError(f"{name}: expected floating-point targets, got {targets.dtype}; convert them with .float()")


def check_target_shape(name: str, targets: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless targets have the shape."""
    if tuple(targets.shape) != shape:
        raise ValueError(f"{name}: expected targets of shape {shape}, got {tuple(targets.shape)}")


def _short(value: Any) -> str:
    """Return a value as it stands in a message: in full if short, else its type."""
    if isinstance(value, int | float | complex | str | None) and len(text := repr(value)) < 80:
        return text
    return type(value).__name__
