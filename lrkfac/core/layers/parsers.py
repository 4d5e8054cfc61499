"""Parsers of calls of torch's functions: products, convolutions and embeddings here, the others in a file beside.

Parsers name their arguments as torch does, since callers may do so, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.private_torch import is_transformed
from lrkfac.core.layers.affine_parsers import ADDITIONS, COLUMN, MULTIPLICATIONS, NORMALIZATIONS, REPETITIONS
from lrkfac.core.layers.calls import Call, Known, Parser
from lrkfac.core.layers.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, ConvolutionOptions
from lrkfac.core.layers.jet_calls import linear_of_jets
from lrkfac.core.layers.kind import Kind, Options
from lrkfac.core.layers.kinds import BIAS, EMBEDDING, LINEAR, LinearOptions
from lrkfac.core.layers.views import Step, View

MATRIX = (Step("flatten", (1,)),)


TURNED = (Step("t"),)


def _with_bias(
    known: Known, kind: Kind, input: Tensor, weight: Tensor, bias: Tensor | None, options: Options, turn: View
) -> Call | None:
    """Return the use of a weight with its bias, or of the bias alone where the weight is no parameter."""
    if known(weight):
        return Call(kind, input, weight, bias, options, turn)
    if bias is not None and known(bias):
        return Call(BIAS, input, bias, None, (kind.name, tuple(options)), COLUMN)
    return None


def _linear(known: Known, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    return _with_bias(known, LINEAR, input, weight, bias, LinearOptions(), ())


def _linear_of_jets(known: Known, rows: Tensor, weight: Tensor, bias: Tensor) -> Call | None:
    return _with_bias(known, LINEAR, rows, weight, bias, LinearOptions(constant=-rows.ndim), ())


def _matmul(known: Known, input: Tensor, other: Tensor, *, out: Any = None) -> Call | None:
    if out is not None:
        return None
    if known(other) and other.ndim == 2:
        return Call(LINEAR, input, other, None, LinearOptions(), TURNED)
    if known(input) and input.ndim == 2:
        if other.ndim == 1:  # one row of a batch inside vmap, else no batch at all
            return Call(LINEAR, other, input, None, LinearOptions()) if is_transformed(other) else None
        columns = (*range(other.ndim - 2), other.ndim - 1, other.ndim - 2)
        return Call(LINEAR, other, input, None, LinearOptions(columns, 1, columns, 1))
    return None


def _reversed_matmul(known: Known, other: Tensor, input: Tensor) -> Call | None:
    return _matmul(known, input, other)


def _mm(known: Known, input: Tensor, mat2: Tensor, *, out: Any = None) -> Call | None:
    return _matmul(known, input, mat2, out=out)


def _mv(known: Known, input: Tensor, vec: Tensor, *, out: Any = None) -> Call | None:
    return _matmul(known, input, vec, out=out)


def _addmm(
    known: Known, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Call | None:
    if beta != 1 or alpha != 1 or out is not None:
        return None
    if not known(mat2) and tuple(input.shape) != tuple(mat2.shape[1:]):
        return None  # repeated, such as [1, d], or one for each row
    return _with_bias(known, LINEAR, mat1, mat2, input, LinearOptions(), TURNED)


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
    of_weight, of_input, result = names[place], names[1 - place], sides[1]
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    dots = "".join(free[: input.ndim - len(of_input.replace("...", ""))])
    of_input, result = of_input.replace("...", dots), result.replace("...", dots)
    contracted = [c for c in of_weight if c in of_input and c not in result]
    kept = [c for c in of_weight if c in result]
    rows = [c for c in result if c not in of_weight]
    plain = (
        len(set(of_weight)) == len(of_weight)
        and set(of_input) == {*rows, *contracted}
        and len(kept + contracted) == len(of_weight)
    )
    if not plain or "..." in of_weight or any(c in of_input for c in kept):
        return None
    options = LinearOptions(
        tuple(of_input.index(c) for c in rows + contracted), len(contracted),
        tuple(result.index(c) for c in rows + kept), len(kept),
    )  # fmt: skip
    d_out = torch.Size([weight.shape[of_weight.index(c)] for c in kept]).numel()
    turn = (Step("permute", tuple(of_weight.index(c) for c in kept + contracted)), Step("reshape", (d_out, -1)))
    return Call(LINEAR, input, weight, None, options, turn)


def _of_each_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
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
    kernel = tuple(weight.shape[2:])
    axes, dilation = len(kernel), _of_each_axis(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in _of_each_axis(0 if isinstance(padding, str) else padding, axes))
    options = ConvolutionOptions(kernel, _of_each_axis(stride, axes), sides, dilation, groups)
    return _with_bias(known, CONVOLUTIONS[axes], input, weight, bias, options, MATRIX)


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
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    sides = tuple((p, p) for p in _of_each_axis(padding, axes))
    options = ConvolutionOptions(
        kernel,
        _of_each_axis(stride, axes),
        sides,
        _of_each_axis(dilation, axes),
        groups,
        True,
        _of_each_axis(output_padding, axes),
    )
    # [groups * d_in, d_out, ...] -> [groups, d_out, d_in, ...]
    turn = (
        Step("unflatten", (0, (groups, -1))),
        Step("transpose", (1, 2)),
        Step("flatten", (0, 1)),
        Step("flatten", (1,)),
    )
    return _with_bias(known, TRANSPOSED_CONVOLUTIONS[axes], input, weight, bias, options, turn)


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


PRODUCTS: dict[Callable[..., Any], Parser] = {
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, Tensor.__rmatmul__: _reversed_matmul,
    torch.mm: _mm, Tensor.mm: _mm, torch.mv: _mv, Tensor.mv: _mv,
}  # fmt: skip
"""Those of matrices and vectors."""

PARSERS: dict[Callable[..., Any], Parser] = {
    F.linear: _linear, linear_of_jets: _linear_of_jets,
    **PRODUCTS, torch.addmm: _addmm, Tensor.addmm: _addmm, torch.einsum: _einsum,
    F.conv1d: _convolution, F.conv2d: _convolution, F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution, F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.embedding: _embedding,
    **NORMALIZATIONS, **MULTIPLICATIONS, **ADDITIONS, **REPETITIONS,
}  # fmt: skip
