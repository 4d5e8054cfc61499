"""Parts and rearrangements of a parameter, followed by name and replayed as static descriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

METHODS = (
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "reshape", "view", "flatten",
    "unflatten", "squeeze", "unsqueeze", "contiguous", "chunk", "split", "narrow", "select", "unbind", "ravel",
)  # fmt: skip


ATTRIBUTES = ("T", "mT")


SAME_ORDER = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "ravel")
"""Methods that keep all entries in their row-major order: undone by a reshape."""


TRANSPOSITIONS = ("t", "T", "mT")
"""Of a matrix: each undone by the same once more."""


class Step(NamedTuple):
    """One method (or attribute) of a tensor with fixed arguments; ``output`` picks one of several results."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    output: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The step taken."""
        found = getattr(x, self.name)
        result = found if self.name in ATTRIBUTES else found(*self.args, **dict(self.kwargs))
        return result if self.output is None else result[self.output]

    def __str__(self) -> str:
        if self.name in ATTRIBUTES:
            return f".{self.name}"
        arguments = ", ".join([*map(str, self.args), *(f"{k}={v}" for k, v in self.kwargs)])
        called = f"[{arguments}]" if self.name == "__getitem__" else f".{self.name}({arguments})"
        return called if self.output is None else f"{called}[{self.output}]"


View = tuple[Step, ...]
"""Steps from a parameter to the tensor that an operation uses."""


def apply_view(view: View, x: Tensor) -> Tensor:
    """The view of ``x``."""
    for step in view:
        x = step(x)
    return x


def scatter_view(view: View, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """The transpose of ``apply_view``: ``x``, in any shape, at its place in a tensor of this shape, zeros elsewhere."""
    if all(step.name in SAME_ORDER for step in view):
        return x.reshape(shape)
    if len(shape) == 2 and all(step.name in TRANSPOSITIONS for step in view):
        return x.reshape(shape[::-1]).mT if len(view) % 2 else x.reshape(shape)
    part, transpose = vjp(lambda whole: apply_view(view, whole), torch.zeros(shape, dtype=x.dtype, device=x.device))
    return transpose(x.reshape(part.shape))[0]


def is_view(func: Callable[..., Any]) -> str | None:
    """The name of the method or attribute if ``func`` is one that only rearranges a tensor."""
    return _NAMES.get(func)


def picks_by_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether entries are picked by a tensor of numbers, as in ``w[numbers]``: no static description."""
    # Not by tree_leaves, through which the compiler of torch 2.11 cannot pass slices.
    return any(_holds_tensor(x) for x in (*args[1:], *kwargs.values()))


def _holds_tensor(x: Any) -> bool:
    return any(_holds_tensor(one) for one in x) if isinstance(x, tuple | list) else isinstance(x, Tensor)


def steps_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[tuple[Step, Tensor]]:
    """The steps from the tensor ``args[0]`` to each tensor that such a call returned."""
    rest = tuple(args[1:])
    named = tuple(sorted(kwargs.items()))
    if isinstance(result, Tensor):
        return [(Step(name, rest, named), result)]
    return [(Step(name, rest, named, i), part) for i, part in enumerate(result)]


def _functions() -> dict[Callable[..., Any], str]:
    found: dict[Callable[..., Any], str] = {}
    for name in METHODS:
        found[getattr(Tensor, name)] = name
        if hasattr(torch, name):
            found[getattr(torch, name)] = name
    found[Tensor.__getitem__] = "__getitem__"
    for name in ATTRIBUTES:
        found[getattr(Tensor, name).__get__] = name
    return found


_NAMES = _functions()
