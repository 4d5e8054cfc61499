"""Everything that the package uses of torch without torch documenting it, one small function each.

Written for torch 2.11 to 2.14. ``tests/core/base/test_private_torch.py`` has a test for each function, so that a torch
that changes one of them fails there first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def transformation_level() -> int | None:
    """Return the depth of the transformations of ``torch.func`` around the caller, ``None`` outside of them."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level


def is_transformed(x: Tensor) -> bool:
    """Return whether a transformation of ``torch.func`` stands around a tensor, so that it has no values to look at."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped


def version(x: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return x._version


def is_watched() -> bool:
    """Return whether a ``TorchFunctionMode`` is active."""
    return torch._C._len_torch_function_stack() > 0


def hand_to_mode(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function through the innermost active ``TorchFunctionMode``, as torch calls its own functions.

    ``torch.overrides.handle_torch_function`` is documented and does the same, but ``torch.compile`` leaves it out.
    """
    with torch.overrides._pop_mode_temporarily() as mode:
        return mode.__torch_function__(function, (), args, kwargs)


class _Intercept(TorchDispatchMode):
    def __init__(self, handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.handle(func, args, kwargs or {})


def intercept(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> AbstractContextManager[Any]:
    """Return a context in which ``handle(operation, args, kwargs)`` runs in the place of each ``aten`` operation."""
    return _Intercept(handle)


_without_values: ContextVar[bool] = ContextVar("_without_values", default=False)


class _OutsideFakeMode(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _without_values.get()


_OUTSIDE_FAKE_MODE = _OutsideFakeMode()


@contextmanager
def fake_mode() -> Iterator[None]:
    """Run a block in which new tensors have shapes but no values; tensors with values may take part.

    Torch logs each exception of an operation on such tensors as an error, also one that is raised and handled; here it
    does not.
    """
    # Not at the top: the import takes as long as the rest of the package.
    from torch._subclasses.fake_tensor import FakeTensorMode

    logging.getLogger("torch._subclasses.fake_tensor").addFilter(_OUTSIDE_FAKE_MODE)  # no more than once
    before = _without_values.set(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _without_values.reset(before)


def is_fake(x: Any) -> bool:
    """Return whether a tensor was made in ``fake_mode``."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


def value_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of ``fake_mode`` where a path or a shape depends on the values of tensors."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return DataDependentOutputException, DynamicOutputShapeException


def operation_counts() -> dict[Any, Callable[..., int]]:
    """Return torch's table from an ``aten`` operation to the function that counts its multiplications and additions.

    ``torch.utils.flop_counter`` documents the counter, not its table.
    """
    from torch.utils.flop_counter import flop_registry  # takes a while to import

    return flop_registry


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target in place, in few kernels."""
    torch._foreach_copy_(list(targets), list(sources))
