"""Views of a parameter, parts and rearrangements, as static descriptions that can be replayed and transposed."""

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
"""Methods that keep all entries in their row-major order; a reshape is their inverse."""


TRANSPOSITIONS = ("t", "T", "mT")
"""Transpositions of a matrix; each is its own inverse."""


class Step(NamedTuple):
    """A method or attribute of a tensor with fixed arguments; ``output`` picks one of several results."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    output: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result of the method, or the attribute."""
        member = getattr(x, self.name)
        result = member if self.name in ATTRIBUTES else member(*self.args, **dict(self.kwargs))
        return result if self.output is None else result[self.output]

    def __str__(self) -> str:
        if self.name in ATTRIBUTES:
            return f".{self.name}"
        arguments = ", ".join([*map(str, self.args), *(f"{k}={v}" for k, v in self.kwargs)])
        code = f"[{arguments}]" if self.name == "__getitem__" else f".{self.name}({arguments})"
        return code if self.output is None else f"{code}[{self.output}]"


View = tuple[Step, ...]
"""The steps from a parameter to the tensor that an operation uses."""


def apply_view(view: View, x: Tensor) -> Tensor:
    """Return the view of ``x``."""
    for step in view:
        x = step(x)
    return x


def scatter_view(view: View, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Return ``x`` at its place in a tensor of zeros of this shape: the transpose of ``apply_view``.

    ``x`` may have any shape with the entries of the view in row-major order.
    """
    if all(step.name in SAME_ORDER for step in view):
        return x if x.shape == shape else x.reshape(shape)
    if len(shape) == 2 and all(step.name in TRANSPOSITIONS for step in view):
        return x.reshape(shape[::-1]).mT if len(view) % 2 else x.reshape(shape)
    part, transpose = vjp(lambda whole: apply_view(view, whole), torch.zeros(shape, dtype=x.dtype, device=x.device))
    return transpose(x.reshape(part.shape))[0]


def view_name(func: Callable[..., Any]) -> str | None:
    """Return the name of a method or attribute that only rearranges a tensor, ``None`` for other functions."""
    return _NAMES.get(func)


def picks_by_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a tensor of numbers picks entries, as in ``w[numbers]``, which is no static description."""
    # Not by tree_leaves, through which the compiler of torch 2.11 cannot pass slices.
    return any(_holds_tensor(x) for x in (*args[1:], *kwargs.values()))


def _holds_tensor(x: Any) -> bool:
    return any(_holds_tensor(one) for one in x) if isinstance(x, tuple | list) else isinstance(x, Tensor)


def steps_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[tuple[Step, Tensor]]:
    """Return the step from ``args[0]`` to each tensor that a call of a view returned, with that tensor."""
    rest = tuple(args[1:])
    named = tuple(sorted(kwargs.items()))
    if isinstance(result, Tensor):
        return [(Step(name, rest, named), result)]
    return [(Step(name, rest, named, i), part) for i, part in enumerate(result)]


def _view_names() -> dict[Callable[..., Any], str]:
    names: dict[Callable[..., Any], str] = {}
    for name in METHODS:
        names[getattr(Tensor, name)] = name
        if hasattr(torch, name):
            names[getattr(torch, name)] = name
    names[Tensor.__getitem__] = "__getitem__"
    for name in ATTRIBUTES:
        names[getattr(Tensor, name).__get__] = name
    return names


_NAMES = _view_names()
