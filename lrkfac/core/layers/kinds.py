"""The layer kinds: for each its operation, its gradient as a matrix and its rows.

Everything that K-FAC needs of a layer follows from its operation ``s = op(a, W)``, linear in the matrix
``W`` ``[d_out, d_in]``, and from that operation's transpose ``G = opᵀ(a, g)``, the gradient with respect to
``W``. The input factor is ``A V = opᵀ(a, op(a, Vᵀ))ᵀ / n``: ``V`` takes the place of the weights, nothing is
unfolded.

An entry sees inputs ``[N, ...]`` and output gradients ``[k, N, ...]`` in a standard form, made by ``prepare``: the
batch in front, channels at the axis that ``channel`` says; complex numbers then become real (``rows.as_real``). A
grouped operation is ``groups`` operations side by side: an entry describes one of them, mapped over groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.rows import as_real
from lrkfac.core.layers.custom import CustomOptions

Options = tuple[Any, ...]


def _no_groups(options: Options) -> int:
    return 1


def _last(options: Options) -> int:
    return -1


@dataclass(frozen=True)
class Kind:
    """One kind of layer, by its operation and the transpose of it.

    Attributes:
        name: As shown in the table of layers.
        prepare: ``(a, g, N, options) -> (a, g)``: the standard form of the operation's input and of the gradients at
            its output, ``g`` with a leading axis ``k``.
        transpose: ``(a, g, d, options) -> [k, d]`` for one group: the gradient of ``sum(g * s)`` with respect to ``W``.
        operation: ``(a, W, options) -> s`` for one group, without bias; ``W`` is ``[k, d]`` and ``s`` has ``k``
            channels. ``None`` for kinds whose blocks are no Kronecker products.
        groups: ``options -> `` number of groups.
        channel: ``options -> `` axis of the channels in ``g`` (and in ``a``, where ``groups > 1``), from the end.
        rows: ``(a, d) -> [n, d]`` where the rows need no unfolding, else ``None``.
        one_hot: Whether the rows of the weight are picked by number (``a`` holds integers): then the *output* side
            of ``W`` is one-hot and the gradients are the rows of its input side.
        unit_wise: Whether the Fisher block is small blocks, one for each output (scales and shifts), and no product.
        picks: Whether rows consist of entries of ``a``, so that the squares of rows are the rows of the squares.
    """

    name: str
    prepare: Callable[[Tensor, Tensor, int, Options], tuple[Tensor, Tensor]]
    transpose: Callable[[Tensor, Tensor, int, Options], Tensor]
    operation: Callable[[Tensor, Tensor, Options], Tensor] | None = None
    groups: Callable[[Options], int] = _no_groups
    channel: Callable[[Options], int] = _last
    rows: Callable[[Tensor, int], Tensor] | None = None
    one_hot: bool = False
    unit_wise: bool = False
    picks: bool = True


# Linear -----------------------------------------------------------------------------------------------


class LinearOptions(NamedTuple):
    """The permutations that arrange the operands of a product as rows.

    Attributes:
        input: Permutation of the input's axes that brings the contracted ones to the end; empty for none.
        contracted: Number of contracted axes.
        output: Permutation of the output's axes that brings the weight's axes to the end; empty for none.
        kept: Number of the weight's axes in the output.
    """

    input: tuple[int, ...] = ()
    contracted: int = 1
    output: tuple[int, ...] = ()
    kept: int = 1


def _arranged(x: Tensor, permutation: tuple[int, ...], trailing: int) -> Tensor:
    if permutation:
        leading = x.ndim - len(permutation)
        x = x.permute(*range(leading), *(leading + axis for axis in permutation))
    return x if trailing == 1 else x.flatten(x.ndim - trailing) if trailing else x[..., None]


def _prepare_linear(a: Tensor, g: Tensor, n: int, options: Options) -> tuple[Tensor, Tensor]:
    o = LinearOptions(*options)
    a, g = _arranged(a, o.input, o.contracted), _arranged(g, o.output, o.kept)
    a, g = _batched(a, n), _batched(g, n, leading=1)
    return (_of_each(a, g) if a.ndim > 1 else a), g


def _of_each(a: Tensor, g: Tensor) -> Tensor:
    """Return the input once for each example, where all share one."""
    return a.expand(g.shape[1], *a.shape[1:]) if a.shape[0] == 1 else a


def _batched(x: Tensor, n: int, leading: int = 0) -> Tensor:
    """Return ``x`` with the batch in front, also where it was flattened together with the positions of a sequence."""
    sizes = x.shape[leading:]
    if len(sizes) > 1 and sizes[0] != n and sizes[0] % n == 0:
        return x.unflatten(leading, (n, -1))
    return x


def _linear_rows(a: Tensor, d: int) -> Tensor:
    return a.reshape(-1, d)


LINEAR = Kind(
    name="linear",
    prepare=_prepare_linear,
    transpose=lambda a, g, d, options: g.reshape(-1, g.shape[-1]).mT @ _linear_rows(a, d),
    operation=lambda a, w, options: a @ w.mT,
    rows=_linear_rows,
)


# Convolutions -----------------------------------------------------------------------------------------


class ConvolutionOptions(NamedTuple):
    """Settings of a convolution over ``len(kernel)`` axes; ``padding`` has ``(before, after)`` for each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


def _prepare_convolution(a: Tensor, g: Tensor, n: int, options: Options) -> tuple[Tensor, Tensor]:
    o = ConvolutionOptions(*options)
    axes = len(o.kernel) + 1
    a, g = a.reshape(-1, *a.shape[-axes:]), g.reshape(g.shape[0], -1, *g.shape[-axes:])
    if any(before != after for before, after in o.padding):
        sides = [side for pair in reversed(o.padding) for side in pair]
        a = F.pad(a, sides)
    return _of_each(a, g), g


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
    return torch.convolution(a, _kernel(w, o), None, list(o.stride), padding, list(o.dilation), o.transposed, zeros, 1)


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
    )


CONVOLUTIONS = {axes: _convolution_kind(f"conv{axes}d") for axes in (1, 2, 3)}


TRANSPOSED_CONVOLUTIONS = {axes: _convolution_kind(f"conv_transpose{axes}d") for axes in (1, 2, 3)}


# Embedding --------------------------------------------------------------------------------------------


def _prepare_embedding(a: Tensor, g: Tensor, n: int, options: Options) -> tuple[Tensor, Tensor]:
    return _of_each(a, g), g


def counts(numbers: Tensor, size: int, padding: int | None) -> Tensor:
    """Return how often each number occurs, ``[size]`` in float32; the padding does not count."""
    flat = numbers.reshape(-1)
    weight = torch.ones(flat.shape, dtype=torch.float32, device=flat.device)
    weight = weight if padding is None else torch.where(flat == padding, 0.0, weight)
    return torch.zeros(size, dtype=weight.dtype, device=flat.device).index_add(0, flat, weight)


def _embedding_transpose(a: Tensor, g: Tensor, d: int, options: Options) -> Tensor:
    size, padding = options
    numbers, rows = a.reshape(-1), g.reshape(-1, d)
    rows = rows if padding is None else torch.where((numbers == padding)[:, None], 0.0, rows).to(rows.dtype)
    return torch.zeros(size, d, dtype=g.dtype, device=g.device).index_add(0, numbers, rows)


EMBEDDING = Kind(
    name="embedding", prepare=_prepare_embedding, transpose=_embedding_transpose, rows=_linear_rows, one_hot=True
)


# Biases, scales and shifts ----------------------------------------------------------------------------


def _bias_prepare(a: Tensor, g: Tensor, n: int, options: Options) -> tuple[Tensor, Tensor]:
    kind, inner = options
    _, g = KINDS[kind].prepare(a, g, n, inner)
    g = g.real if g.is_complex() else g  # of a complex output, a real bias shifts the real part alone
    return g.new_ones(g.shape[1], 1), g.movedim(KINDS[kind].channel(inner), -1)


BIAS = Kind(
    name="bias",
    prepare=_bias_prepare,
    transpose=lambda a, g, d, options: g.reshape(-1, g.shape[-1]).sum(dim=0)[:, None],
    operation=lambda a, w, options: a @ w.mT,
    rows=_linear_rows,
)
"""A bias as a separate layer: its input is the constant 1; its options are kind and options of the weight's layer."""


def _affine_prepare(a: Tensor, g: Tensor, n: int, options: Options) -> tuple[Tensor, Tensor]:
    """Return input and output gradients as ``[N, positions, units]``.

    ``options`` is the parameter's shape, aligned with the last axes of the output by broadcasting.
    """
    (shape,) = options
    aligned = (1,) * (g.ndim - 1 - len(shape)) + tuple(shape)
    a = a.broadcast_to(g.shape[1:])
    repeated = [axis for axis, size in enumerate(aligned) if size == 1 and axis > 0]
    units = [axis for axis, size in enumerate(aligned) if size != 1 and axis > 0]
    order = [0, *repeated, *units]
    a = a.permute(order).reshape(a.shape[0], math.prod([a.shape[i] for i in repeated]), -1)
    g = g.permute(0, *(i + 1 for i in order))
    return a, g.reshape(*g.shape[:2], a.shape[1], a.shape[2])


def _affine_transpose(a: Tensor, g: Tensor, d: int, options: Options) -> Tensor:
    return (g * a).reshape(-1, g.shape[-1]).sum(dim=0)[:, None]


SCALE = Kind(name="scale", prepare=_affine_prepare, transpose=_affine_transpose, unit_wise=True)
"""``s = scale * a`` unit by unit, with or without a shift: of a normalisation, or a parameter that is multiplied."""


SHIFT = Kind(name="shift", prepare=_affine_prepare, transpose=_affine_transpose, unit_wise=True)
"""``s = a + shift``: a parameter that is added or repeated for every example; its input is the constant 1."""


# Custom kinds --------------------------------------------------------------------------------------------


def _custom_prepare(a: Tensor, g: Tensor, n: int, options: Options) -> tuple[Tensor, Tensor]:
    return as_real(_of_each(a, g), -1), g if options[0].weight_axis is not None else g[..., None]


CUSTOM = Kind(
    name="custom",
    prepare=_custom_prepare,
    transpose=lambda a, g, d, options: CustomOptions(*options).transpose(a, g, d),
    operation=lambda a, w, options: CustomOptions(*options).apply_real(a, w),
    channel=lambda options: CustomOptions(*options).kind.channel,
    picks=False,
)
"""A custom layer kind; its ``LayerKind`` stands in the options, so that no table has to grow."""


KINDS = {
    kind.name: kind
    for kind in (
        LINEAR, *CONVOLUTIONS.values(), *TRANSPOSED_CONVOLUTIONS.values(), EMBEDDING, BIAS, SCALE, SHIFT, CUSTOM,
    )
}  # fmt: skip
