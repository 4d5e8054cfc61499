"""Parsers of calls that scale or shift each unit: normalisations, multiplications, additions, repetitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.layers.calls import Call, Known, Parser
from lrkfac.core.layers.jet_calls import added_to_values
from lrkfac.core.layers.kinds import SCALE, SHIFT
from lrkfac.core.layers.views import Step

COLUMN = (Step("reshape", (-1, 1)),)


def _normalised(plain: Callable[..., Tensor]) -> Parser:
    """Return a parser of a normalisation with scale and shift: its input is its result without them."""

    def parse(known: Known, input: Tensor, *args: Any, **kwargs: Any) -> Call | None:
        scale, shift, without, aligned = plain(input, *args, **kwargs)
        if scale is not None and known(scale):
            return Call(SCALE, without(), scale, shift, (aligned,), COLUMN)
        if shift is not None and known(shift):
            return Call(SHIFT, input.new_ones(()), shift, None, (aligned,), COLUMN)
        return None

    return parse


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    return weight, bias, lambda: F.layer_norm(x, shape, None, None, eps), tuple(shape)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    return weight, None, lambda: F.rms_norm(x, shape, None, eps), tuple(shape)


def _channels(x: Tensor) -> tuple[int, ...]:
    return (x.shape[1], *[1] * (x.ndim - 2))


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    return weight, bias, lambda: F.group_norm(x, num_groups, None, None, eps), _channels(x)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    kept = (None, None) if training else (running_mean, running_var)
    return weight, bias, lambda: F.batch_norm(x, *kept, None, None, training, momentum, eps), _channels(x)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    kept = (None, None) if use_input_stats else (running_mean, running_var)
    without = lambda: F.instance_norm(x, *kept, None, None, use_input_stats, momentum, eps)  # noqa: E731
    return weight, bias, without, _channels(x)


def _multiplied(known: Known, input: Any, other: Any, *, out: Any = None) -> Call | None:
    scale, x = (input, other) if known(input) else (other, input)
    if out is not None or not known(scale) or known(x) or not isinstance(x, Tensor) or x.ndim < max(scale.ndim, 1):
        return None
    return Call(SCALE, x, scale, None, (tuple(scale.shape),), COLUMN)


def _added(known: Known, input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Call | None:
    shift, x = (input, other) if known(input) else (other, input)
    plain = alpha == 1 and out is None
    if not plain or not known(shift) or known(x) or not isinstance(x, Tensor) or x.ndim < max(shift.ndim, 1):
        return None
    return Call(SHIFT, x.new_ones(()), shift, None, (tuple(shift.shape),), COLUMN)


def _added_to_values(known: Known, rows: Tensor, shift: Tensor) -> Call | None:
    if not known(shift):
        return None
    return Call(SHIFT, rows.new_ones(()), shift, None, (tuple(shift.shape), -rows.ndim), COLUMN)


def _expanded(known: Known, shift: Tensor, *sizes: Any, **kwargs: Any) -> Call | None:
    return Call(SHIFT, shift.new_ones(()), shift, None, (tuple(shift.shape),), COLUMN) if known(shift) else None


NORMALIZATIONS: dict[Callable[..., Any], Parser] = {
    F.layer_norm: _normalised(_layer_norm), F.rms_norm: _normalised(_rms_norm),
    F.group_norm: _normalised(_group_norm), F.batch_norm: _normalised(_batch_norm),
    F.instance_norm: _normalised(_instance_norm),
}  # fmt: skip
MULTIPLICATIONS: dict[Callable[..., Any], Parser] = dict.fromkeys(
    (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiplied
)
ADDITIONS: dict[Callable[..., Any], Parser] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _added),
    added_to_values: _added_to_values,
}
REPETITIONS: dict[Callable[..., Any], Parser] = dict.fromkeys((Tensor.expand, Tensor.expand_as), _expanded)
