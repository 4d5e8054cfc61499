"""Which functions of torch are which kind of layer: from the arguments of a call to its standard form.

Parsers name their arguments as torch does: callers may, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.layers.kinds import (
    CONVOLUTIONS,
    EMBEDDING,
    LINEAR,
    SCALE,
    SHIFT,
    TRANSPOSED_CONVOLUTIONS,
    ConvolutionOptions,
    Kind,
    LinearOptions,
    Options,
)
from lrkfac.core.layers.views import Step, View


class Call(NamedTuple):
    """One use of a weight.

    Attributes:
        kind: The layer's kind.
        input: What multiplies the weight, ``[N, ...]``.
        weight: The weight, as the operation received it.
        bias: What the operation adds, if anything.
        options: Settings that stay the same.
        turn: Steps from the weight to the matrix ``[groups * d_out, d_in]``.
    """

    kind: Kind
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options
    turn: View = ()


Known = Callable[[Any], bool]
"""Whether an argument is a parameter, or a view of one."""


Parser = Callable[..., Call | None]


MATRIX = (Step("flatten", (1,)),)


TURNED = (Step("t"),)


COLUMN = (Step("reshape", (-1, 1)),)


def _linear(known: Known, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    return Call(LINEAR, input, weight, bias, LinearOptions()) if known(weight) else None


def _matmul(known: Known, input: Tensor, other: Tensor, *, out: Any = None) -> Call | None:
    if out is not None:
        return None
    if known(other) and other.ndim == 2:
        return Call(LINEAR, input, other, None, LinearOptions(), TURNED)
    if known(input) and input.ndim == 2:
        if other.ndim == 1:
            return None
        columns = (*range(other.ndim - 2), other.ndim - 1, other.ndim - 2)
        return Call(LINEAR, other, input, None, LinearOptions(columns, 1, columns, 1))
    return None


def _reversed_matmul(known: Known, other: Tensor, input: Tensor) -> Call | None:
    return _matmul(known, input, other)


def _mm(known: Known, input: Tensor, mat2: Tensor, *, out: Any = None) -> Call | None:
    return _matmul(known, input, mat2, out=out)


def _addmm(
    known: Known, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Call | None:
    if beta != 1 or alpha != 1 or out is not None or not known(mat2):
        return None
    return Call(LINEAR, mat1, mat2, input, LinearOptions(), TURNED)


def _einsum(known: Known, equation: str, *operands: Any) -> Call | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2 or known(operands[0]) == known(operands[1]):
        return None
    place = 0 if known(operands[0]) else 1
    weight, input = operands[place], operands[1 - place]
    sides = equation.replace(" ", "").split("->")
    names = sides[0].split(",")
    if len(sides) != 2 or len(names) != 2:
        return None
    ours, theirs, result = names[place], names[1 - place], sides[1]
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    dots = "".join(free[: input.ndim - len(theirs.replace("...", ""))])
    theirs, result = theirs.replace("...", dots), result.replace("...", dots)
    contracted = [c for c in ours if c in theirs and c not in result]
    kept = [c for c in ours if c in result]
    rows = [c for c in result if c not in ours]
    plain = len(set(ours)) == len(ours) and set(theirs) == {*rows, *contracted} and len(kept + contracted) == len(ours)
    if not plain or "..." in ours or any(c in theirs for c in kept):
        return None
    options = LinearOptions(
        tuple(theirs.index(c) for c in rows + contracted), len(contracted),
        tuple(result.index(c) for c in rows + kept), len(kept),
    )  # fmt: skip
    d_out = torch.Size([weight.shape[ours.index(c)] for c in kept]).numel()
    turn = (Step("permute", tuple(ours.index(c) for c in kept + contracted)), Step("reshape", (d_out, -1)))
    return Call(LINEAR, input, weight, None, options, turn)


def _many(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _convolution(
    known: Known,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call | None:
    if not known(weight):
        return None
    kernel = tuple(weight.shape[2:])
    axes, dilation = len(kernel), _many(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in _many(0 if isinstance(padding, str) else padding, axes))
    options = ConvolutionOptions(kernel, _many(stride, axes), sides, dilation, groups)
    return Call(CONVOLUTIONS[axes], input, weight, bias, options, MATRIX)


def _transposed_convolution(
    known: Known,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Call | None:
    if not known(weight):
        return None
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    sides = tuple((p, p) for p in _many(padding, axes))
    options = ConvolutionOptions(
        kernel, _many(stride, axes), sides, _many(dilation, axes), groups, True, _many(output_padding, axes)
    )
    # [groups * d_in, d_out, ...] -> [groups, d_out, d_in, ...]
    turn = (
        Step("unflatten", (0, (groups, -1))),
        Step("transpose", (1, 2)),
        Step("flatten", (0, 1)),
        Step("flatten", (1,)),
    )
    return Call(TRANSPOSED_CONVOLUTIONS[axes], input, weight, bias, options, turn)


def _embedding(
    known: Known,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if not known(weight) or max_norm is not None or scale_grad_by_freq:
        return None
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return Call(EMBEDDING, input, weight, None, (weight.shape[0], padding))


def _normalised(plain: Callable[..., Tensor]) -> Parser:
    """A normalisation with scale and shift: its input is what it returns without them."""

    def parse(known: Known, input: Tensor, *args: Any, **kwargs: Any) -> Call | None:
        scale, shift, without, aligned = plain(input, *args, **kwargs)
        if scale is None or not known(scale):
            return None
        return Call(SCALE, without(), scale, shift, (aligned,), COLUMN)

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


def _expanded(known: Known, shift: Tensor, *sizes: Any, **kwargs: Any) -> Call | None:
    return Call(SHIFT, shift.new_ones(()), shift, None, (tuple(shift.shape),), COLUMN) if known(shift) else None


PARSERS: dict[Callable[..., Any], Parser] = {
    F.linear: _linear,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, Tensor.__rmatmul__: _reversed_matmul,
    torch.mm: _mm, Tensor.mm: _mm, torch.addmm: _addmm, Tensor.addmm: _addmm, torch.einsum: _einsum,
    F.conv1d: _convolution, F.conv2d: _convolution, F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution, F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.embedding: _embedding,
    F.layer_norm: _normalised(_layer_norm), F.rms_norm: _normalised(_rms_norm),
    F.group_norm: _normalised(_group_norm), F.batch_norm: _normalised(_batch_norm),
    F.instance_norm: _normalised(_instance_norm),
    torch.mul: _multiplied, Tensor.mul: _multiplied, Tensor.__mul__: _multiplied, Tensor.__rmul__: _multiplied,
    torch.add: _added, Tensor.add: _added, Tensor.__add__: _added, Tensor.__radd__: _added,
    Tensor.expand: _expanded, Tensor.expand_as: _expanded,
}  # fmt: skip
