"""One entry per kind of layer: its operation, its rows, its gradient as a matrix.

Everything that K-FAC needs of a layer follows from its own operation ``s = op(a, W)``, linear in ``W``,
and from that operation's transpose ``G = opᵀ(a, g)``, the gradient with respect to ``W``. The input
factor is ``A V = opᵀ(a, op(a, Vᵀ))ᵀ / n``: ``V`` takes the place of the weights, nothing is unfolded.

A grouped operation is ``groups`` operations side by side: an entry describes one of them, and everything
made from it is mapped over groups (``lrkfac.core.covariances``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Options = tuple[Any, ...]


class Call(NamedTuple):
    """One call of a layer's operation: tensors and the settings that stay the same."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options


@dataclass(frozen=True)
class Kind:
    """What the package knows about one kind of layer.

    Attributes:
        name: As shown in the table of layers.
        functions: The functions of torch that carry the operation out.
        parse: The arguments of such a call, as a ``Call``.
        operation: ``(a, W, options) -> s`` for one group, without bias; ``W`` is ``[k, d]`` and ``s`` has ``k``
            channels.
        transpose: ``(a, g, d, options) -> [k, d]``: the gradient of ``sum(g * s)`` with respect to ``W``;
            further leading axes of ``a`` and ``g`` are summed over.
        groups: ``options -> `` number of groups.
        channel: ``options -> `` axis of the channels in ``s`` (and in ``a``, where ``groups > 1``), from the end.
        rows: ``(a, d) -> [n, d]`` where the rows need no unfolding, else ``None``.
    """

    name: str
    functions: tuple[Callable[..., Any], ...]
    parse: Callable[..., Call]
    operation: Callable[[Tensor, Tensor, Options], Tensor]
    transpose: Callable[[Tensor, Tensor, int, Options], Tensor]
    groups: Callable[[Options], int]
    channel: Callable[[Options], int]
    rows: Callable[[Tensor, int], Tensor] | None = None


def _parse_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(input, weight, bias, ())


def _linear_rows(a: Tensor, d: int) -> Tensor:
    return a.reshape(-1, d)


LINEAR = Kind(
    name="linear",
    functions=(F.linear,),
    parse=_parse_linear,
    operation=lambda a, w, options: a @ w.mT,
    transpose=lambda a, g, d, options: g.reshape(-1, g.shape[-1]).mT @ _linear_rows(a, d),
    groups=lambda options: 1,
    channel=lambda options: -1,
    rows=_linear_rows,
)


class ConvolutionOptions(NamedTuple):
    """Settings of a two-dimensional convolution; ``padding`` is ``(left, right, top, bottom)``."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def _parse_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    kernel = (weight.shape[2], weight.shape[3])
    dilation = _pair(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        assert not isinstance(padding, str)
        sides = [(p, p) for p in _pair(padding)]
    (top, bottom), (left, right) = sides
    options = ConvolutionOptions(kernel, _pair(stride), (left, right, top, bottom), dilation, groups)
    return Call(input, weight, bias, options)


def _conv2d(a: Tensor, w: Tensor, options: Options) -> Tensor:
    o = ConvolutionOptions(*options)
    a, padding = _padded(a, o)
    return F.conv2d(a, w.reshape(w.shape[0], -1, *o.kernel), None, o.stride, padding, o.dilation)


def _conv2d_transpose(a: Tensor, g: Tensor, d: int, options: Options) -> Tensor:
    o = ConvolutionOptions(*options)
    a, padding = _padded(a, o)
    a, g = a.reshape(-1, *a.shape[-3:]), g.reshape(-1, *g.shape[-3:])
    shape = (g.shape[1], d // (o.kernel[0] * o.kernel[1]), *o.kernel)
    return conv2d_weight(a, shape, g, o.stride, padding, o.dilation).reshape(-1, d)


def _padded(a: Tensor, o: ConvolutionOptions) -> tuple[Tensor, tuple[int, int]]:
    """The input and the symmetric padding left to do: ``"same"`` with an even kernel pads unevenly."""
    left, right, top, bottom = o.padding
    if (left, top) == (right, bottom):
        return a, (top, left)
    return F.pad(a, o.padding), (0, 0)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return values[0], values[1]


CONV2D = Kind(
    name="conv2d",
    functions=(F.conv2d,),
    parse=_parse_conv2d,
    operation=_conv2d,
    transpose=_conv2d_transpose,
    groups=lambda options: ConvolutionOptions(*options).groups,
    channel=lambda options: -3,
)


def _bias_operation(a: Tensor, w: Tensor, options: Options) -> Tensor:
    return w.mT.movedim(-1, 0).reshape(-1, *[1] * (-options[0] - 1))


def _bias_transpose(a: Tensor, g: Tensor, d: int, options: Options) -> Tensor:
    rows = g.movedim(options[0], -1)
    return rows.reshape(-1, rows.shape[-1]).sum(dim=0)[:, None]


BIAS = Kind(
    name="bias",
    functions=(),
    parse=Call,
    operation=_bias_operation,
    transpose=_bias_transpose,
    groups=lambda options: 1,
    channel=lambda options: options[0],
)
"""A bias on its own: its input is the constant 1, its option the channel axis of the layer it belongs to."""

KINDS = {kind.name: kind for kind in (LINEAR, CONV2D, BIAS)}
KIND_OF = {function: kind for kind in KINDS.values() for function in kind.functions}
