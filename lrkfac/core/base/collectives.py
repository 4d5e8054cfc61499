"""Sums over processes and gathered rows as operations of torch, right under ``vmap``, derivatives and the compiler.

The functional collectives of ``torch.distributed`` have the derivative 0 under ``jvp`` and wrong values under ``vmap``,
without an error. Those in place have wrong derivatives. An ``autograd.Function`` around them is wrong in a compiled
``vmap``. So these are custom operations with a rule for ``vmap``, in eager code within an ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Register:
    """The groups of this process by name: operations take numbers and strings, no groups."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}

    def add(self, group: Any) -> str:
        """Register a group, and return its name."""
        self._groups[group.group_name] = group
        return str(group.group_name)

    def group(self, name: str) -> Any:
        """Return a group.

        Raises:
            RuntimeError: If this process has not registered it, as after unpickling elsewhere; ``WORLD`` is known.
        """
        world = dist.group.WORLD
        if world is not None and world.group_name == name:
            return world  # after unpickling, and after another init_process_group()
        if name not in self._groups:
            raise RuntimeError(
                f"group: expected the group {name!r} to be known to this process, known are {sorted(self._groups)}; "
                "what was pickled with a group is used where evaluator(..., group=) was called with the same group"
            )
        return self._groups[name]


class CollectiveError(RuntimeError):
    """A collective operation failed, or another process did not take part in it."""


register = Register()
_counters: list[Callable[[str, int], None]] = []


@contextmanager
def count_calls(counter: Callable[[str, int], None]) -> Iterator[None]:
    """Call ``counter(operation, bytes)`` for each collective operation within."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.remove(counter)


@contextmanager
def _called(operation: str, x: Tensor, name: str) -> Iterator[Any]:
    for counter in _counters:
        counter(operation, x.numel() * x.element_size())
    with reported(f"{operation} of {x.numel()} numbers", name) as group:
        yield group


@contextmanager
def reported(call: str, name: str) -> Iterator[Any]:
    """Give the group of a name, and say which ``call`` between its processes failed, and what may be the cause.

    Raises:
        CollectiveError: For an error of ``torch.distributed`` within.
    """
    group = register.group(name)
    try:
        yield group
    except RuntimeError as error:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        raise CollectiveError(
            f"rank {rank} of {size}: {call} failed, or another rank did not take part "
            "within the timeout of the group, the argument timeout of init_process_group; all ranks must call the same "
            "functions in the same order with parameters of the same shapes. Look for an error on another rank, and "
            f"run with TORCH_DISTRIBUTED_DEBUG=DETAIL to find the first call that differs ({error})"
        ) from error


@torch.library.custom_op("lrkfac::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with _called("all_reduce", x, group) as processes:
        dist.all_reduce(total, group=processes)
    return total


@_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_all_reduce.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, group: str) -> tuple[Tensor, int]:
    return all_reduce(x, group), in_dims[0]


@torch.library.custom_op("lrkfac::all_gather", mutates_args=())
def _all_gather(x: Tensor, group: str, size: int) -> Tensor:
    rows = x.new_empty(size * x.shape[0], *x.shape[1:])
    with _called("all_gather", x, group) as processes:
        dist.all_gather(list(rows.chunk(size)), x.contiguous(), group=processes)
    return rows


@_all_gather.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(size * x.shape[0], *x.shape[1:])


@_all_gather.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, group: str, size: int) -> tuple[Tensor, int]:
    return _all_gather(x.movedim(in_dims[0], -1), group, size), x.ndim - 1


@torch.library.custom_op("lrkfac::reduce_scatter", mutates_args=())
def _reduce_scatter(x: Tensor, group: str) -> Tensor:
    total = x.new_empty(x.shape[1:])
    with _called("reduce_scatter", x, group) as processes:
        dist.reduce_scatter(total, list(x.contiguous().unbind()), group=processes)
    return total


@_reduce_scatter.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[1:])


@_reduce_scatter.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, group: str) -> tuple[Tensor, int]:
    return _reduce_scatter(x.movedim(in_dims[0], -1), group), x.ndim - 2


class _Sum(torch.autograd.Function):
    """The sum as torch.func differentiates it; the derivative of all processes' sums in one's own part is a sum."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Any:
        return _all_reduce(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        (_, ctx.group) = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return all_reduce(gradients[0], ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return all_reduce(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: str) -> tuple[Tensor, int]:
        return all_reduce(x, group), in_dims[0]


class _Gather(torch.autograd.Function):
    """Gathered rows as torch.func differentiates them."""

    @staticmethod
    def forward(x: Tensor, group: str, size: int, rank: int) -> Any:
        return _all_gather(x, group, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *ctx.where = inputs
        ctx.length = x.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = all_reduce(gradients[0], ctx.where[0])
        return total.narrow(0, ctx.where[2] * ctx.length, ctx.length), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Gather.apply(tangents[0], *ctx.where)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: str, size: int, rank: int) -> tuple[Tensor, int]:
        return _Gather.apply(x.movedim(in_dims[0], -1), group, size, rank), x.ndim - 1


class _Scattered(torch.autograd.Function):
    """One's own part of a sum as torch.func differentiates it: the derivative in all parts is that of their owners."""

    @staticmethod
    def forward(x: Tensor, group: str, size: int, rank: int) -> Any:
        return _reduce_scatter(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *ctx.where = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return all_gather(gradients[0][None], *ctx.where), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Scattered.apply(tangents[0], *ctx.where)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, group: str, size: int, rank: int) -> tuple[Tensor, int]:
        return _Scattered.apply(x.movedim(in_dims[0], -1), group, size, rank), x.ndim - 2


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Return the sum of ``x`` over the processes of a registered group."""
    if torch.compiler.is_compiling():
        return _all_reduce(x, group)
    total: Tensor = _Sum.apply(x, group)
    return total


def all_gather(x: Tensor, group: str, size: int, rank: int) -> Tensor:
    """Return the rows ``[n, *]`` of the ``size`` processes of a registered group one after another, ``[size n, *]``."""
    if torch.compiler.is_compiling():
        return _all_gather(x, group, size)
    rows: Tensor = _Gather.apply(x, group, size, rank)
    return rows


def reduce_scatter(x: Tensor, group: str, size: int, rank: int) -> Tensor:
    """Return this process' part ``[*]`` of the sum of ``x`` ``[size, *]`` over the processes of a registered group."""
    if torch.compiler.is_compiling():
        return _reduce_scatter(x, group)
    part: Tensor = _Scattered.apply(x, group, size, rank)
    return part
