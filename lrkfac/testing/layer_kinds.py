"""The laws of custom layer kinds: the operation is that of the function, and a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, finfo

from lrkfac.core.layers.custom import CustomOptions, LayerKind
from lrkfac.core.layers.custom_calls import custom_call
from lrkfac.core.layers.views import apply_view
from lrkfac.testing.laws import check_close, check_law
from lrkfac.testing.strategies import gradients


def check_layer_kind(kind: LayerKind, *args: Any, **kwargs: Any) -> None:
    """Check the laws of a custom ``LayerKind`` at the arguments of a call of its function.

    * The output is that of ``operation`` with the weight as a matrix, plus the bias along ``channel``;
    * ``operation`` is linear in the matrix, and each of its outputs depends on its own row alone, in the same way;
    * each example's output depends on this example alone;
    * the input does not depend on the weight.

    Examples:
        >>> import torch
        >>> kind = LayerKind("linear", lambda x, w: x @ w.mT, lambda x, w: x @ w.mT)
        >>> check_layer_kind(kind, torch.ones(5, 3).double(), torch.eye(2, 3).double())

    Args:
        kind: The kind.
        *args: The arguments of the call: float64, a few examples.
        **kwargs: Its keyword arguments.

    Raises:
        AssertionError: Says which law is broken, and by how much.
        TypeError: If an argument is a floating-point tensor of another dtype.
    """
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and finfo(x.dtype).bits < 64:
            raise TypeError(f"args: expected float64, as the tolerances need, got {x.dtype}; call .double() on it")
    call = custom_call((kind,), kind, lambda x: isinstance(x, Tensor), args, kwargs)
    check_law(call is not None, "parts: the weight is a tensor")
    assert call is not None
    a, matrix, options = call.input, apply_view(call.turn, call.weight), CustomOptions(*call.options)
    weights = [x for x in (*args, *kwargs.values()) if x is call.weight]
    check_law(len(weights) == 1, "parts: the weight is one of the arguments, as it is")

    output = kind(*args, **kwargs)
    s = output[..., None] if kind.weight_axis is None else output
    result = options.apply(a, matrix)
    check_law(
        result.shape == s.shape, f"operation: the shape of the output, {tuple(s.shape)}, got {tuple(result.shape)}"
    )
    check_law(
        s.ndim >= -kind.channel and s.shape[kind.channel] == len(matrix),
        f"channel: the axis {kind.channel} of the output, {tuple(s.shape)}, holds the {len(matrix)} rows of the weight",
    )
    if call.bias is not None:
        check_law(
            call.bias.numel() == matrix.shape[0], f"bias: one number for each output, got {tuple(call.bias.shape)}"
        )
        result = result + call.bias.reshape(-1, *[1] * (-kind.channel - 1))
    check_close(result, s, 1e-9, "operation: with the weight and the bias, the output")

    others = gradients(torch.stack([matrix, matrix]), seed=1)
    many = options.apply(a, torch.cat([matrix, *others]))
    parts = [options.apply(a, x) for x in (matrix, *others)]
    together = torch.cat(parts, dim=kind.channel)
    check_law(
        many.shape == together.shape,
        f"channel: three times as many rows make the axis {kind.channel} of the output three times as long, "
        f"{tuple(together.shape)}, got {tuple(many.shape)}",
    )
    check_close(many, together, 1e-9, "operation: each output by its own row of W")
    same = options.apply(a, matrix[:1].expand(3, -1)).movedim(kind.channel, 0)
    check_close(same, same[:1].expand_as(same), 1e-9, "operation: equal rows of W give equal outputs")
    mixed = options.apply(a, 2 * others[0] - 3 * others[1])
    check_close(mixed, 2 * parts[1] - 3 * parts[2], 1e-9, "operation: linear in W")
    each = torch.cat([options.apply(a[i : i + 1], matrix) for i in range(len(a))])
    check_close(each, parts[0], 1e-9, "operation: each example by itself")

    def replaced(x: Any) -> Any:
        return others[0].reshape(-1)[: x.numel()].reshape(x.shape) if x is call.weight else x

    changed = tuple(map(replaced, args)), {name: replaced(x) for name, x in kwargs.items()}
    again = custom_call((kind,), kind, lambda x: isinstance(x, Tensor), *changed)
    check_law(again is not None and torch.equal(again.input, a), "parts: the input does not depend on the weight")
