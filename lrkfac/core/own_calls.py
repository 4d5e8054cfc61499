"""Calls of operations of one's own in the form of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.calls import Call, Known
from lrkfac.core.layers import OWN, Kind, Options
from lrkfac.core.own_kinds import LayerKind, OwnOptions
from lrkfac.core.views import Step, taken

COLUMNS = 64
"""How many columns of rows are formed at a time, where rows are not made of the input's entries."""


def call_of_own(kinds: tuple[LayerKind, ...], func: Any, known: Known, args: Any, kwargs: Any) -> Call | None:
    """The call as one of the first kind whose function it is, if there is one and its weight is followed."""
    for kind in kinds:
        if func is kind or func is kind.function:
            input, weight, *rest = kind.parts(*args, **kwargs)
            if not known(weight):
                return None
            bias = rest[0] if rest else None
            settings = tuple(rest[1]) if len(rest) > 1 else ()
            turn: tuple[Step, ...] = (Step("reshape", (1, -1)),)
            if kind.weight_axis is not None:
                d_out = weight.shape[kind.weight_axis]
                turn = (Step("movedim", (kind.weight_axis, 0)), Step("reshape", (d_out, -1)))
            return Call(OWN, input, weight, bias, OwnOptions(kind, settings, input.ndim - 1), turn)
    return None


def check_use(call: Call, output: Tensor) -> None:
    """Refuses a use whose output is not what its kind says.

    Raises:
        ValueError: Names the kind.
    """
    options = OwnOptions(*call.options)
    matrix = taken(call.turn, call.weight)
    found = tuple(options.apply(call.input, matrix).shape)
    expected = (*output.shape, 1) if options.kind.weight_axis is None else tuple(output.shape)
    if found != expected:
        raise ValueError(
            f"kinds: {options.kind.name!r}: expected its operation to return the shape {expected} for the input "
            f"{tuple(call.input.shape)} and weights {tuple(matrix.shape)}, got {found}"
        )


def mean_squares(kind: Kind, inputs: Sequence[Tensor], each: Sequence[Options], d: int) -> Tensor:
    """The mean of the squared rows of some uses, ``[d]``, by the rows themselves, ``op(a, I)``."""
    assert kind.operation is not None
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
    eye, found = torch.eye(d, dtype=dtype, device=inputs[0].device), []
    for part in eye.split(COLUMNS):
        uses = [kind.operation(a, part, o).movedim(kind.channel(o), -1) for a, o in zip(inputs, each, strict=True)]
        rows = torch.cat([s.reshape(-1, len(part)) for s in uses])
        found.append(rows.square().mean(dim=0))
    return torch.cat(found)
