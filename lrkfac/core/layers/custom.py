"""Custom layer kinds: any operation that is linear in its weight, as a kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from lrkfac.core.base.arguments import check_function
from lrkfac.core.base.private_torch import hand_to_mode, is_watched
from lrkfac.core.base.rows import as_real


def _input_weight_bias(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    """Return the first two or three arguments."""
    return input, weight, bias


@dataclass(frozen=True, repr=False)
class LayerKind:
    """A custom layer kind: an operation with a weight, for ``find_layers(..., kinds=(kind,))``.

    The operation is linear in the weight and treats all its outputs alike. For every example and position ``t`` (of a
    convolution, a sequence), ``s_t = W a_t + b``, where the rows ``a_t`` follow from the input alone. ``operation`` is
    that map with a matrix of any number of outputs in the weight's place. All else follows from it: the gradient and
    the way back by its derivative, ``A V`` by both, with ``V`` as the matrix, so that rows are never formed. Only the
    diagonal of ``A``, and with it what a low rank leaves out, needs the operation with as many outputs as ``a`` has
    entries, 64 at a time. ``lrkfac.testing.check_layer_kind`` checks all this.

    The weight is real; input and output may be complex. Each complex row then counts as two, of its real and of its
    imaginary parts.

    The model calls the ``LayerKind`` itself, as it would call ``function``. Where ``function`` is torch's, such as
    ``F.bilinear``, it calls that, and need not be changed. A kind copies and pickles where its functions do, and kinds
    with equal attributes are equal.

    Examples:
        >>> import torch
        >>> from lrkfac import find_layers
        >>> product = LayerKind("product of two inputs", lambda x, y, w: (x * y) @ w.mT, lambda a, w: a @ w.mT,
        ...                     parts=lambda x, y, w: (x * y, w))
        >>> model = lambda params, x: product(x, x.cos(), params["w"])
        >>> layers = find_layers(model, {"w": torch.ones(2, 3)}, torch.ones(5, 3), kinds=(product,))
        >>> layers["w"].kind, layers["w"].d_out, layers["w"].d_in
        ('product of two inputs', 2, 3)

    Attributes:
        name: As shown in the table of layers.
        function: Computes the output, from whatever arguments.
        operation: ``(input, W, *settings) -> s`` without bias, with ``W`` ``[k, d]`` for any ``k``, and ``s`` like the
            output, ``k`` along the axis ``channel``; for any number of examples.
        parts: From the arguments of a call ``(input, weight)``, ``(input, weight, bias)`` or ``(input, weight, bias,
            settings)``; by default these are the first two or three arguments. ``input`` ``[N, ...]`` is what the rows
            follow from, made of the arguments if need be; ``settings`` is a tuple of numbers and names that stay the
            same.
        weight_axis: The weight's axis of outputs; the others, flattened, are the ``d`` columns of ``W``. ``None`` for a
            weight without one, such as a filter; the output then has no axis of channels either, and ``operation`` has
            it as the last.
        channel: The axis of the channels in the output, from the end.

    Raises:
        TypeError: If an attribute that should be a function is none, or an axis is no integer.
        ValueError: If ``channel`` is not counted from the end.
    """

    name: str
    function: Callable[..., Tensor]
    operation: Callable[..., Tensor]
    parts: Callable[..., tuple[Any, ...]] = _input_weight_bias
    weight_axis: int | None = 0
    channel: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {type(self.name).__name__}")
        for name in ("function", "operation", "parts"):
            check_function(getattr(self, name), name)
        for name, axis in {"weight_axis": self.weight_axis, "channel": self.channel}.items():
            if isinstance(axis, bool) or not (isinstance(axis, int) or (axis is None and name == "weight_axis")):
                raise TypeError(f"{name}: expected an integer, got {axis!r}")
        if self.channel >= 0 or (self.weight_axis is None and self.channel != -1):
            allowed = (
                "-1, where weight_axis is None" if self.weight_axis is None else "an axis from the end, such as -1"
            )
            raise ValueError(f"channel: expected {allowed}, got {self.channel}")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of ``function``; ``find_layers`` and the evaluator see the call."""
        if is_watched():
            result: Tensor = hand_to_mode(self, args, kwargs)
            return result
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"LayerKind({self.name!r})"


class CustomOptions(NamedTuple):
    """The settings of a use.

    Attributes:
        kind: The kind.
        settings: Those of its call.
        axes: The number of the input's axes but the batch.
        complex: Whether the input is complex; in the standard form, its last axis then holds real and imaginary parts.
    """

    kind: LayerKind
    settings: tuple[Any, ...]
    axes: int
    complex: bool = False

    def apply(self, a: Tensor, w: Tensor) -> Tensor:
        """Return the kind's operation, with all leading axes of the input as one batch."""
        return self.kind.operation(a.reshape(-1, *a.shape[a.ndim - self.axes :]), w, *self.settings)

    def apply_real(self, a: Tensor, w: Tensor) -> Tensor:
        """Return the same in the standard form, in which all numbers are real."""
        return as_real(self.apply(torch.complex(*a.unbind(-1)) if self.complex else a, w), 1)

    def transpose(self, a: Tensor, g: Tensor, d: int) -> Tensor:
        """Return the gradient of ``sum(g * s)`` with respect to ``W``, ``[k, d]``."""
        s, back = vjp(lambda w: self.apply_real(a, w), g.new_zeros(g.shape[self.kind.channel], d))
        return back(g.reshape(s.shape))[0]
