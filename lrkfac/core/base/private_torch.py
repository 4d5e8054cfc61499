"""Everything that the package uses of torch without torch documenting it, one small function each.

Written for torch 2.11 to 2.14. ``tests/core/base/test_private_torch.py`` has a test for each function, so that a torch
that changes one of them fails there first. What it uses of ``fully_shard`` is in ``private_fsdp.py``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


def transformation_level() -> int | None:
    """Return the depth of the transformations of ``torch.func`` around the caller, ``None`` outside of them."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return level


def transformations() -> list[tuple[str, int]]:
    """Return kind ("vmap", "grad" or "jvp") and level of each transformation around the caller, the outermost first."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [(one.key().name.lower(), one.level()) for one in stack]


def is_differentiated() -> bool:
    """Return whether a transformation of ``torch.func`` that takes derivatives stands around the caller."""
    return any(kind in ("grad", "jvp") for kind, _ in transformations())


def is_mapped() -> bool:
    """Return whether ``vmap`` stands around the caller."""
    return any(kind == "vmap" for kind, _ in transformations())


# The compiler asks while it traces, when the same transformations stand around, and traces anew under others. This is
# torch.compiler.assume_constant_result, which would import the compiler.
is_differentiated._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_mapped._dynamo_marked_constant = True  # type: ignore[attr-defined]


def within_vmap(x: Tensor) -> Tensor:
    """Return the tensor that ``vmap`` maps over, with all its axes; others pass."""
    while torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def forward_level() -> int:
    """Return the level of ``torch.autograd.forward_ad`` around the caller, -1 outside of it."""
    return torch.autograd.forward_ad._current_level


def is_inside_function() -> bool:
    """Return whether the caller stands inside the forward of a custom ``torch.autograd.Function``."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None


_APPLY = inspect.unwrap(torch.autograd.Function.apply).__code__


def without_checkpoints() -> AbstractContextManager[Any]:
    """Return a context in which ``torch.utils.checkpoint`` calls its functions and recomputes nothing.

    A function that is called again in the backward pass would see other parameters (``functional_call`` has put the
    module's back) and no probes. Other threads meanwhile recompute nothing, either: they take more memory.
    """
    return nullcontext() if torch.compiler.is_compiling() else _WithoutCheckpoints()


class _Plain:
    """In the place of both kinds of checkpoint: the first is called, the second runs around a call."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield


class _WithoutCheckpoints:
    replaced: ClassVar = {"CheckpointFunction": _Plain, "_checkpoint_without_reentrant_generator": _Plain.around}
    kept: ClassVar[dict[str, Any]] = {}
    lock: ClassVar = threading.Lock()
    count: ClassVar = 0

    def __enter__(self) -> None:
        import torch.utils.checkpoint as module

        with self.lock:
            if not _WithoutCheckpoints.count:
                self.kept.update({name: getattr(module, name) for name in self.replaced})
                for name, value in self.replaced.items():
                    setattr(module, name, value)
            _WithoutCheckpoints.count += 1

    def __exit__(self, *error: Any) -> None:
        import torch.utils.checkpoint as module

        with self.lock:
            _WithoutCheckpoints.count -= 1
            if not _WithoutCheckpoints.count:
                for name, value in self.kept.items():
                    setattr(module, name, value)


def has_backward_hooks(x: nn.Module | Tensor) -> bool:
    """Return whether a module or a parameter has hooks that a backward pass calls."""
    names = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(x, name, None) for name in names)


def iterates_spectral_norm(module: nn.Module) -> bool:
    """Return whether a forward pass would take a step of ``spectral_norm``'s power iteration, new or old."""
    old = any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
    return module.training and (old or isinstance(module, nn.utils.parametrizations._SpectralNorm))


def has_old_weight_norm(module: nn.Module) -> bool:
    """Return whether the deprecated ``torch.nn.utils.weight_norm`` computes a weight of the module."""
    return any(type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values())


def with_mapped_axes(x: Tensor, levels: Sequence[int]) -> Tensor | None:
    """Return a tensor inside ``vmap`` with the mapped axes in front, ``None`` unless all these levels map it."""
    for level in reversed(levels):
        x, axis = torch._C._functorch._unwrap_batched(x, level)
        if axis is None:
            return None
        x = x.movedim(axis, 0)
    return x


def without_mapped_axes(x: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the tensor that functions inside ``vmap`` see, from the one with the mapped axes in front."""
    for level in levels:
        x = torch._C._functorch._add_batch_dim(x, 0, level)
    return x


def tensor_without_values(kind: type, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tensor of a subclass that has a shape and no storage: operations reach its ``__torch_function__``."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


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


@functools.cache
def _fake_mode_type() -> Any:
    # Not at the top: the import takes as long as the rest of the package.
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Mode(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # The zeros of forward derivatives inside vmap lose their device here, others do not.
            lazy = func is torch.ops.aten._efficientzerotensor.default
            return super().__torch_dispatch__(torch.ops.aten.zeros.default if lazy else func, types, args, kwargs or {})

    return Mode


@contextmanager
def fake_mode() -> Iterator[None]:
    """Run a block in which new tensors have shapes but no values; tensors with values may take part.

    Torch logs each exception of an operation on such tensors as an error, also one that is raised and handled; here it
    does not.
    """
    logging.getLogger("torch._subclasses.fake_tensor").addFilter(_OUTSIDE_FAKE_MODE)  # no more than once
    before = _without_values.set(True)
    try:
        with _fake_mode_type()(allow_non_fake_inputs=True):
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


def multiplied_all(xs: Sequence[Tensor], scale: float | Tensor) -> list[Tensor]:
    """Return ``scale * x`` of each tensor, all of one dtype and device, in one call without a rule for ``vmap``."""
    return list(torch._foreach_mul(tuple(xs), scale))


def added_all(xs: Sequence[Tensor], scale: float, ys: Sequence[Tensor]) -> list[Tensor]:
    """Return ``x + scale * y`` of each pair, likewise."""
    return list(torch._foreach_add(tuple(xs), tuple(ys), alpha=scale))


def weak_reference(x: Tensor) -> Callable[[], Tensor | None]:
    """Return a function that returns a tensor as long as something else keeps it alive, ``None`` afterwards."""
    from torch.utils.weak import TensorWeakRef

    return TensorWeakRef(x)


def registered_container(kind: type) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]] | None:
    """Return how to take a container apart, ``x -> (entries, context)``, and to make one, ``(entries, context) -> x``.

    By what was registered with ``torch.utils._pytree.register_pytree_node``; ``None`` for other types.
    """
    node = _pytree.SUPPORTED_NODES.get(kind)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)


def register_without_leaves(kind: type) -> None:
    """Make torch's pytree take instances of a type for parts of a tree's structure."""
    _pytree.register_pytree_node(kind, lambda value: ([], value), lambda _, value: value)
