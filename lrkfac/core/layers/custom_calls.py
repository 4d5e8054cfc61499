"""Calls of custom layer kinds, in the standard form of all calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrkfac.core.layers.calls import Call, Known
from lrkfac.core.layers.custom import CustomOptions, LayerKind
from lrkfac.core.layers.kinds import CUSTOM
from lrkfac.core.layers.views import Step, apply_view


def custom_call(kinds: tuple[LayerKind, ...], func: Any, known: Known, args: Any, kwargs: Any) -> Call | None:
    """Return the call as a use of the first kind whose function it is; ``None`` without such a kind or known weight."""
    for kind in kinds:
        if func is kind.function or (isinstance(func, LayerKind) and func == kind):
            input, weight, *rest = kind.parts(*args, **kwargs)
            if not known(weight):
                return None
            bias = rest[0] if rest else None
            settings = tuple(rest[1]) if len(rest) > 1 else ()
            turn: tuple[Step, ...] = (Step("reshape", (1, -1)),)
            if kind.weight_axis is not None:
                d_out = weight.shape[kind.weight_axis]
                turn = (Step("movedim", (kind.weight_axis, 0)), Step("reshape", (d_out, -1)))
            return Call(
                CUSTOM, input, weight, bias, CustomOptions(kind, settings, input.ndim - 1, input.is_complex()), turn
            )
    return None


def check_use(call: Call, output: Tensor) -> None:
    """Raise unless the kind's operation returns the shape of the output."""
    options = CustomOptions(*call.options)
    matrix = apply_view(call.turn, call.weight)
    shape = tuple(options.apply(call.input, matrix).shape)
    expected = (*output.shape, 1) if options.kind.weight_axis is None else tuple(output.shape)
    if shape != expected:
        raise ValueError(
            f"kinds: {options.kind.name!r}: expected its operation to return the shape {expected} for the input "
            f"{tuple(call.input.shape)} and weights {tuple(matrix.shape)}, got {shape}"
        )
