"""Functions of operators as methods of custom ones, and checks of the vectors that functions take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.linalg.operator_checks import OPERATORS, check_operator, is_custom


def method_of(operator: Any, name: str, or_else: str | None = None) -> Callable[..., Any] | None:
    """Return the method of this name of a custom operator; ``None`` for one of the package, whose entries are checked.

    Also ``None`` for a custom operator that has ``or_else`` in its place.

    Raises:
        TypeError: If it is no operator, or one without the method.
        ValueError: If the entries of an operator of the package do not fit together.
    """
    if not is_custom(operator):
        check_operator(operator)
        return None
    method = getattr(operator, name, None)
    if callable(method):
        return method
    if or_else is not None and callable(getattr(operator, or_else, None)):
        return None
    wanted = f"{name}()" if or_else is None else f"{name}() or {or_else}()"
    raise TypeError(
        f"operator: expected one of lrkfac's operators or a custom one with a method {wanted}, got "
        f"{type(operator).__name__}"
    )


def check_vectors(operator: Any, x: Any, name: str) -> None:
    """Raise unless ``x`` is a vector ``[d]`` or columns ``[d, n]`` that an operator of the package can be applied to.

    Raises:
        TypeError: If it is no tensor of the operator's dtype.
        ValueError: If its shape or device does not fit.
    """
    if not isinstance(operator, OPERATORS):
        return
    like = next(iter(tree_leaves(operator)))
    if not isinstance(x, Tensor) or x.dtype != like.dtype:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a tensor of {like.dtype}, as the operator's, got {got}")
    d = operator.dimension
    if x.ndim not in (1, 2) or x.shape[0] != d:
        raise ValueError(f"{name}: expected a vector [{d}] or columns [{d}, n], got the shape {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, as the operator's, got one on {x.device}")
