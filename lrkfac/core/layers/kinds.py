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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.rows import as_real, with_constant
from lrkfac.core.layers.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lrkfac.core.layers.custom import CustomOptions
from lrkfac.core.layers.kind import Kind, Options, by_example, of_each
from lrkfac.core.layers.placement import Placement

# Linear -----------------------------------------------------------------------------------------------


class LinearOptions(NamedTuple):
    """The permutations that arrange the operands of a product as rows.

    Attributes:
        input: Permutation of the input's axes that brings the contracted ones to the end; empty for none.
        contracted: Number of contracted axes.
        output: Permutation of the output's axes that brings the weight's axes to the end; empty for none.
        kept: Number of the weight's axes in the output.
        constant: Where rows hold the constant input of a joint bias: 0 for all of them; an axis counted from the end
            for those at its first entry, the values of jets; ``None`` for rows without it.
    """

    input: tuple[int, ...] = ()
    contracted: int = 1
    output: tuple[int, ...] = ()
    kept: int = 1
    constant: int | None = None


def _arranged(x: Tensor, permutation: tuple[int, ...], trailing: int) -> Tensor:
    if permutation:
        leading = x.ndim - len(permutation)
        x = x.permute(*range(leading), *(leading + axis for axis in permutation))
    return x if trailing == 1 else x.flatten(x.ndim - trailing) if trailing else x[..., None]


def _prepare_linear(
    a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None
) -> tuple[Tensor, Tensor]:
    o = LinearOptions(*options)
    a = _arranged(a, o.input, o.contracted)
    a = a if o.constant is None else with_constant(a, o.constant)
    a, g = by_example(a, _arranged(g, o.output, o.kept), n, placement)
    return (of_each(a, g) if a.ndim > 1 else a), g


def _places_of_rows(x: Tensor, side: int, options: Options) -> tuple[Tensor, Sequence[int]]:
    o = LinearOptions(*options)
    x = _arranged(x, o.output, o.kept) if side else _arranged(x, o.input, o.contracted)
    return x, range(x.ndim - 1)


def _linear_rows(a: Tensor, d: int) -> Tensor:
    return a.reshape(-1, d)


LINEAR = Kind(
    name="linear",
    prepare=_prepare_linear,
    transpose=lambda a, g, d, options: g.reshape(-1, g.shape[-1]).mT @ _linear_rows(a, d),
    operation=lambda a, w, options: a @ w.mT,
    places=_places_of_rows,
    rows=_linear_rows,
)


# Embedding --------------------------------------------------------------------------------------------


def _prepare_rows(a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None) -> tuple[Tensor, Tensor]:
    a, g = by_example(a, g, n, placement)
    return of_each(a, g), g


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
    name="embedding",
    prepare=_prepare_rows,
    transpose=_embedding_transpose,
    places=lambda x, side, options: (x, range(x.ndim - side)),
    rows=_linear_rows,
    one_hot=True,
)


# Biases, scales and shifts ----------------------------------------------------------------------------


def _bias_prepare(a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None) -> tuple[Tensor, Tensor]:
    kind, inner = options
    axis = LinearOptions(*inner).constant or 0 if kind == LINEAR.name else 0
    if axis < 0:  # of jets, it is added to the values alone
        a, g = a.narrow(axis, 0, 1), g.narrow(axis, 0, 1)
    _, g = KINDS[kind].prepare(a, g, n, inner, placement)
    g = g.real if g.is_complex() else g  # of a complex output, a real bias shifts the real part alone
    return g.new_ones(g.shape[1], 1), g.movedim(KINDS[kind].channel(inner), -1)


BIAS = Kind(
    name="bias",
    prepare=_bias_prepare,
    transpose=lambda a, g, d, options: g.reshape(-1, g.shape[-1]).sum(dim=0)[:, None],
    operation=lambda a, w, options: a @ w.mT,
    rows=_linear_rows,
    places=lambda x, side, options: KINDS[options[0]].places(x, side, options[1]),
)
"""A bias as a separate layer: its input is the constant 1; its options are kind and options of the weight's layer."""


def _prepare_jacobian(
    a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None
) -> tuple[Tensor, Tensor]:
    return g.new_ones(g.shape[1], 1), g.flatten(2) if g.ndim > 2 else g[..., None]


JACOBIAN = Kind(
    name="jacobian",
    prepare=_prepare_jacobian,
    transpose=lambda a, g, d, options: g.reshape(-1, g.shape[-1]).sum(dim=0)[:, None],
    operation=lambda a, w, options: a @ w.mT,
    rows=_linear_rows,
)
"""A whole parameter, whatever uses it: the rows are the gradients of single examples, and the input is 1."""


def _affine_prepare(
    a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None
) -> tuple[Tensor, Tensor]:
    """Return input and output gradients as ``[N, positions, units]``.

    ``options`` is the parameter's shape, aligned with the last axes of the output by broadcasting, and, where it is
    added to the values of jets alone, the axis along which these are the first, counted from the end.
    """
    shape, *of_values = options
    assert placement is not None, "scales and shifts are uncovered where their examples are not known"
    place = placement[1]
    if of_values:
        g = g.narrow(of_values[0], 0, 1)
    a = a.broadcast_to(g.shape[1:])
    repeated, units = _axes_of_units(a.ndim, tuple(shape))
    order = [place.axis, *[axis for axis in repeated if axis != place.axis], *units]
    size = math.prod([a.shape[axis] for axis in units])
    place = place._replace(axis=0)
    a = place.in_front(a.permute(order), n)
    g = place.in_front(g.permute(0, *(i + 1 for i in order)), n, leading=1)
    positions = math.prod(a.shape[1:]) // size if size else 0
    return a.reshape(a.shape[0], positions, size), g.reshape(*g.shape[:2], positions, size)


def _axes_of_units(ndim: int, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return the axes along which a parameter repeats, and those of its entries, aligned by broadcasting."""
    aligned = (1,) * (ndim - len(shape)) + shape
    axes = range(ndim)
    return [axis for axis in axes if aligned[axis] == 1], [axis for axis in axes if aligned[axis] != 1]


def _affine_transpose(a: Tensor, g: Tensor, d: int, options: Options) -> Tensor:
    return (g * a).reshape(-1, g.shape[-1]).sum(dim=0)[:, None]


def _places_of_units(x: Tensor, side: int, options: Options) -> tuple[Tensor, Sequence[int]]:
    return x, _axes_of_units(x.ndim, tuple(options[0]))[0]


SCALE = Kind("scale", _affine_prepare, _affine_transpose, places=_places_of_units, unit_wise=True)
"""``s = scale * a`` unit by unit, with or without a shift: of a normalisation, or a parameter that is multiplied."""


SHIFT = Kind("shift", _affine_prepare, _affine_transpose, places=_places_of_units, unit_wise=True)
"""``s = a + shift``: a parameter that is added or repeated for every example; its input is the constant 1."""


# Custom kinds --------------------------------------------------------------------------------------------


def _prepare_custom(
    a: Tensor, g: Tensor, n: int, options: Options, placement: Placement | None
) -> tuple[Tensor, Tensor]:
    a, g = _prepare_rows(a, g, n, options, placement)
    return as_real(a, -1), g if options[0].weight_axis is not None else g[..., None]


CUSTOM = Kind(
    name="custom",
    prepare=_prepare_custom,
    transpose=lambda a, g, d, options: CustomOptions(*options).transpose(a, g, d),
    operation=lambda a, w, options: CustomOptions(*options).apply_real(a, w),
    channel=lambda options: CustomOptions(*options).kind.channel,
    picks=False,
)
"""A custom layer kind; its ``LayerKind`` stands in the options, so that no table has to grow."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        LINEAR, *CONVOLUTIONS.values(), *TRANSPOSED_CONVOLUTIONS.values(), EMBEDDING, BIAS, SCALE, SHIFT, JACOBIAN,
        CUSTOM,
    )
}  # fmt: skip
