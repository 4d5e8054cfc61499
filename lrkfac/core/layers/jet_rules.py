"""The rules by which functions act on jets, one for each family of functions; ``jet_functions.py`` says for which.

For ``y = f(x)``: ``∂_i y = Df(x)[∂_i x]`` and ``∂_i ∂_j y = Df(x)[∂_i ∂_j x] + D²f(x)[∂_i x, ∂_j x]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from lrkfac.core.layers.jet_calls import added_to_values, linear_of_jets
from lrkfac.core.layers.jets import AnyJet, Jet, Plan, holds_jet, is_jet, jets_of, replaced, rows_at

Function = Callable[..., Any]


def of_values(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Return what has no derivative, such as a shape or the result of a comparison."""
    each = [x.rows[0] for x in jets_of(args, kwargs)]
    args, kwargs = replaced(args, kwargs, each)
    return func(*args, **kwargs)


def of_rows(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Return the result of a function that is linear in its jets together, such as a rearrangement or a sum."""
    jets = jets_of(args, kwargs)

    def of_row(*each: Tensor) -> Any:
        inner, named = replaced(args, kwargs, each)
        return func(*inner, **named)

    result = vmap(of_row)(*[x.rows for x in jets])
    if isinstance(result, tuple | list):
        return type(result)([Jet.of(x, jets[0].plan) for x in result])
    return Jet.of(result, jets[0].plan)


def joined(func: Function, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> AnyJet:
    """Return jets and constants side by side."""
    (first, *_) = jets_of(tensors, {})
    lifted = [x if is_jet(x) else Jet.constant(x, first.plan) for x in tensors]
    jet: AnyJet = of_rows(func, lifted, *args, **kwargs)
    return jet


def chosen(func: Function, *args: Any) -> Any:
    """Return entries of jets or constants where a condition says so, as ``torch.where`` or ``Tensor.where``."""
    (first, *_) = jets_of(args, {})
    like = first.rows[0]
    args = tuple([x.rows[0] if is_jet(x) and func is torch.where and i == 0 else x for i, x in enumerate(args)])
    tensors = [like.new_full((), x) if isinstance(x, int | float) else x for x in args]
    return of_rows(func, *[Jet.constant(x, first.plan) if _is_constant(x) else x for x in tensors])


def _is_constant(x: Any) -> bool:
    return isinstance(x, Tensor) and not is_jet(x) and x.is_floating_point()


def elementwise(func: Function, *args: Any, **kwargs: Any) -> AnyJet:
    """Return an elementwise function of one jet; of several, ``smooth``."""
    if kwargs.get("inplace") or any(x is True for x in args):
        raise ValueError("network: a function with inplace=True changes what depends on the points; pass inplace=False")
    jets = jets_of(args, kwargs)
    if len(jets) > 1:
        return smooth(func, *args, **kwargs)
    ((rows, plan),) = [(x.rows, x.plan) for x in jets]

    def of_value(x: Tensor) -> Tensor:
        inner, named = replaced(args, kwargs, [x])
        result: Tensor = func(*inner, **named)
        return result

    value, slope, bend = DERIVATIVES.get(func, partial(_derivatives, of_value))(rows[0], bool(plan.seconds))
    rows = _aligned(rows, value.ndim)
    first = rows[1 : plan.coordinates + 1]
    return _of_parts(plan, value, slope * rows[1:], lambda i, j: bend * _products(first, i, j))


def _products(rows: Tensor, left: Sequence[int], right: Sequence[int]) -> Tensor:
    return rows_at(rows, left) * rows_at(rows, right)


def _of_parts(plan: Plan, value: Tensor, linear: Tensor, terms: Callable[[Any, Any], Tensor]) -> AnyJet:
    """Return a jet of its value, the linear part ``[d + m, ...]`` of its derivatives, and terms of second ones."""
    if not plan.seconds:
        return Jet.of(torch.cat([value[None], linear]), plan)
    first, second = linear.split([plan.coordinates, len(plan.seconds)])
    return Jet.of(torch.cat([value[None], first, second + plan.quadratic(terms)]), plan)


def _derivatives(func: Function, x: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return value, first and second derivative of an elementwise function."""
    x = x.clone()  # no view: of such, tensors without values have no nested forward derivatives
    one = torch.ones_like(x)
    if not second:
        value, slope = jvp(func, (x,), (one,))
        return value, slope, slope

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = jvp(func, (x,), (one,))
        return slope, value

    slope, bend, value = jvp(both, (x,), (one,), has_aux=True)
    return value, slope, bend


def _tanh(x: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = x.tanh()
    slope = 1 - y.square()
    return y, slope, -2 * y * slope


def _sin(x: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = x.sin()
    return y, x.cos(), -y


DERIVATIVES: dict[Function, Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]]] = {
    torch.tanh: _tanh, Tensor.tanh: _tanh, torch.sin: _sin, Tensor.sin: _sin,
}  # fmt: skip
"""Value, first and second derivative of the functions that networks of points use most, with fewer operations."""


def smooth(func: Function, *args: Any, **kwargs: Any) -> AnyJet:
    """Return any differentiable function of one jet or several, by forward derivatives along all rows."""
    jets = jets_of(args, kwargs)
    plan, values = jets[0].plan, tuple([x.rows[0].clone() for x in jets])  # as in _derivatives

    def of_values(*each: Tensor) -> Tensor:
        inner, named = replaced(args, kwargs, each)
        result: Tensor = func(*inner, **named)
        return result

    def along(*tangents: Tensor) -> Tensor:
        of_one: Tensor = jvp(of_values, values, tangents)[1]
        return of_one

    def twice(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
        of_pair: Tensor = jvp(lambda *each: jvp(of_values, each, right)[1], values, left)[1]
        return of_pair

    def terms(left: Sequence[int], right: Sequence[int]) -> Tensor:
        sides = [tuple([rows_at(x.rows[1 : plan.coordinates + 1], numbers) for x in jets]) for numbers in (left, right)]
        pairs: Tensor = vmap(twice)(*sides)
        return pairs

    return _of_parts(plan, of_values(*values), vmap(along)(*[x.rows[1:] for x in jets]), terms)


# Sums and products -----------------------------------------------------------------------------------------------


def _aligned(rows: Tensor, ndim: int) -> Tensor:
    """Return rows whose entries have at least that many axes, so that they broadcast with such a tensor."""
    missing = ndim + 1 - rows.ndim
    return rows.reshape(rows.shape[0], *[1] * missing, *rows.shape[1:]) if missing > 0 else rows


def _pair(x: AnyJet, other: AnyJet) -> tuple[Tensor, Tensor]:
    ndim = max(x.rows.ndim, other.rows.ndim) - 1
    return _aligned(x.rows, ndim), _aligned(other.rows, ndim)


def added(func: Function, input: Any, other: Any, *, alpha: float = 1) -> AnyJet:
    """Return ``input + alpha * other``."""
    other = other if alpha == 1 else _times(other, alpha)
    if is_jet(input) and is_jet(other):
        left, right = _pair(input, other)
        return Jet.of(left + right, input.plan)
    jet, constant = (input, other) if is_jet(input) else (other, input)
    if not isinstance(constant, Tensor):
        constant = jet.rows.new_full((), constant)
    return Jet.of(added_to_values(_aligned(jet.rows, constant.ndim), constant), jet.plan)


def subtracted(func: Function, input: Any, other: Any, *, alpha: float = 1) -> AnyJet:
    """Return ``input - alpha * other``."""
    return added(func, input, _times(other, -alpha))


def subtracted_from(func: Function, other: Any, input: Any) -> AnyJet:
    """Return ``input - other``, the function being of ``other``."""
    return subtracted(func, input, other)


def _times(x: Any, factor: float) -> Any:
    return Jet.of(x.rows * factor, x.plan) if is_jet(x) else x * factor


def multiplied(func: Function, input: Any, other: Any) -> AnyJet:
    """Return ``input * other``."""
    if is_jet(input) and is_jet(other):
        return bilinear(torch.mul, *[Jet.of(rows, input.plan) for rows in _pair(input, other)])
    jet, factor = (input, other) if is_jet(input) else (other, input)
    return Jet.of(torch.mul(_aligned(jet.rows, getattr(factor, "ndim", 0)), factor), jet.plan)


def divided(func: Function, input: Any, other: Any) -> AnyJet:
    """Return ``input / other``."""
    if is_jet(other):
        return multiplied(torch.mul, input, elementwise(torch.reciprocal, other))
    return Jet.of(torch.div(_aligned(input.rows, getattr(other, "ndim", 0)), other), input.plan)


def divided_from(func: Function, other: Any, input: Any) -> AnyJet:
    """Return ``input / other``, the function being of ``other``."""
    return divided(func, input, other)


def bilinear(product: Function, x: AnyJet, other: AnyJet) -> AnyJet:
    """Return a product of two jets."""
    a, b, plan = x.rows, other.rows, x.plan
    value = product(a[0], b[0])
    linear = vmap(product, (None, 0))(a[0], b[1:]) + vmap(product, (0, None))(a[1:], b[0])

    def terms(left: Sequence[int], right: Sequence[int]) -> Tensor:
        last = plan.coordinates + 1
        i, j = [(rows_at(a[1:last], numbers), rows_at(b[1:last], numbers)) for numbers in (left, right)]
        if left == right:
            return 2 * vmap(product)(i[0], i[1])
        both: Tensor = vmap(product)(i[0], j[1]) + vmap(product)(j[0], i[1])
        return both

    return _of_parts(plan, value, linear, terms)


def linear(func: Function, input: Any, weight: Tensor, bias: Tensor | None = None) -> AnyJet:
    """Return ``F.linear`` of a jet: one operation on the rows of all points."""
    if holds_jet((weight, bias)):
        raise ValueError("network: F.linear with a weight or bias that depends on the points; use torch.matmul")
    if bias is None:
        return Jet.of(F.linear(input.rows, weight), input.plan)
    return Jet.of(linear_of_jets(input.rows, weight, bias), input.plan)


def matrix_product(func: Function, input: Any, other: Any) -> Any:
    """Return ``input @ other``."""
    if is_jet(input) and is_jet(other):
        return bilinear(torch.matmul, input, other)
    if is_jet(input):
        if other.ndim <= 2:
            return Jet.of(torch.matmul(input.rows, other), input.plan)
    elif input.ndim == 2:
        one = other.rows.ndim == 2
        return Jet.of(F.linear(other.rows, input) if one else torch.matmul(input, other.rows), other.plan)
    return of_rows(torch.matmul, input, other)


def reversed_matrix_product(func: Function, other: Any, input: Any) -> Any:
    """Return ``input @ other``, the function being of ``other``."""
    return matrix_product(func, input, other)


def affine_product(func: Function, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Return ``beta * input + alpha * mat1 @ mat2``."""
    product = _times(matrix_product(func, mat1, mat2), alpha) if alpha != 1 else matrix_product(func, mat1, mat2)
    return added(torch.add, product, input if beta == 1 else _times(input, beta))


def einsum(func: Function, equation: str, *operands: Any) -> AnyJet:
    """Return ``torch.einsum``."""
    jet: AnyJet = (of_rows if len(jets_of(operands, {})) == 1 else smooth)(func, equation, *operands)
    return jet


def normalized(
    func: Function, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> AnyJet:
    """Return ``F.layer_norm``: a normalisation without scale and shift, then a product and a sum."""
    # Not by F.layer_norm itself, whose nested forward derivatives are wrong (torch 2.13).
    axes = tuple(range(-len(shape), 0))

    def without(x: Tensor) -> Tensor:
        centered = x - x.mean(axes, keepdim=True)
        return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()

    jet = _scaled(smooth(without, input), weight)
    return jet if bias is None else added(torch.add, jet, bias)


def rms_normalized(func: Function, input: Any, shape: Any, weight: Any = None, eps: float | None = None) -> AnyJet:
    """Return ``F.rms_norm``, likewise."""
    return _scaled(smooth(func, input, shape, None, eps), weight)


def _scaled(jet: AnyJet, weight: Tensor | None) -> AnyJet:
    return jet if weight is None else multiplied(torch.mul, jet, weight)
