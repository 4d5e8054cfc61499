"""The kinds of convolutions, transposed ones among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.layers.kind import Kind, Options, by_example, of_each
from lrkfac.core.layers.placement import Placement


class ConvolutionOptions(NamedTuple):
    """Settings of a convolution over ``len(kernel)`` axes; ``padding`` has ``(before, after)`` for each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


def _prepare_convolution(
    a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None
) -> tuple[Tensor, Tensor]:
    o = ConvolutionOptions(*options)
    axes = len(o.kernel) + 1
    if placement is None:
        a, g = a.reshape(-1, *a.shape[-axes:]), g.reshape(g.shape[0], -1, *g.shape[-axes:])
    if any(before != after for before, after in o.padding):
        sides = [side for pair in reversed(o.padding) for side in pair]
        a = F.pad(a, sides)
    a, g = by_example(a, g, n, placement)
    return of_each(a, g), g


def _symmetric_padding(o: ConvolutionOptions) -> list[int]:
    """Return the padding of the operation; uneven padding (``"same"`` with an even kernel) was done by ``prepare``."""
    uneven = any(before != after for before, after in o.padding)
    return [0 if uneven else before for before, _ in o.padding]


def _kernel(w: Tensor, o: ConvolutionOptions) -> Tensor:
    kernel = w.reshape(w.shape[0], -1, *o.kernel)
    return kernel.transpose(0, 1) if o.transposed else kernel


def _convolution(a: Tensor, w: Tensor, options: Options) -> Tensor:
    o = ConvolutionOptions(*options)
    padding, zeros = _symmetric_padding(o), list(o.output_padding) or [0] * len(o.kernel)
    leading, a = a.shape[: -len(o.kernel) - 1], a.reshape(-1, *a.shape[-len(o.kernel) - 1 :])
    s = torch.convolution(a, _kernel(w, o), None, list(o.stride), padding, list(o.dilation), o.transposed, zeros, 1)
    return s if len(leading) == 1 else s.reshape(*leading, *s.shape[1:])


def _convolution_transpose(a: Tensor, g: Tensor, d: int, options: Options) -> Tensor:
    o = ConvolutionOptions(*options)
    axes = len(o.kernel) + 1
    a, g = a.reshape(-1, *a.shape[-axes:]), g.reshape(-1, *g.shape[-axes:])
    padding, zeros = _symmetric_padding(o), list(o.output_padding) or [0] * len(o.kernel)
    weight = _kernel(g.new_empty(1).expand(g.shape[1], d), o)
    stride, dilation = list(o.stride), list(o.dilation)
    gradient = torch.ops.aten.convolution_backward(
        g, a, weight, None, stride, padding, dilation, o.transposed, zeros, 1, (False, True, False)
    )[1]
    return (gradient.transpose(0, 1) if o.transposed else gradient).reshape(-1, d)


def _convolution_kind(name: str) -> Kind:
    return Kind(
        name=name,
        prepare=_prepare_convolution,
        transpose=_convolution_transpose,
        operation=_convolution,
        groups=lambda options: ConvolutionOptions(*options).groups,
        channel=lambda options: -len(ConvolutionOptions(*options).kernel) - 1,
        places=lambda x, side, options: (x, range(x.ndim - len(ConvolutionOptions(*options).kernel) - 1)),
    )


CONVOLUTIONS = {axes: _convolution_kind(f"conv{axes}d") for axes in (1, 2, 3)}


TRANSPOSED_CONVOLUTIONS = {axes: _convolution_kind(f"conv_transpose{axes}d") for axes in (1, 2, 3)}
