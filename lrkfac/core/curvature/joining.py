"""Gradients and inverses of several blocks, joined so that one call preconditions them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.stacks import stacked
from lrkfac.core.layers.matrix import LayerMatrix


class Joining(NamedTuple):
    """How tensors of several blocks become one, and the result becomes several again.

    Attributes:
        join: Of tensors; ``None`` where blocks stay apart.
        split: The inverse, from the result and the tensors that were joined.
        any_output: Whether layers may differ in ``d_out``.
    """

    join: Callable[[list[Tensor]], Tensor] | None
    split: Callable[[Tensor, list[Any]], Any]
    any_output: bool = False

    def inverses(self, inverses: list[Any]) -> Any:
        """Return the inverse of all blocks."""
        if len(inverses) == 1 or self.join is None:
            return inverses[0]
        return optree.tree_map(lambda *x: self.join(list(x)), *inverses)

    def gradient(self, parts: list[LayerMatrix]) -> LayerMatrix:
        """Return the gradient of all layers."""
        if len(parts) == 1 or self.join is None:
            return parts[0]
        weights, biases = [part.weight for part in parts], [part.bias for part in parts if part.bias is not None]
        weight: Any
        if isinstance(weights[0], LazyMatrix):
            left, right = (self.join([getattr(one, side) for one in weights]) for side in ("left", "right"))
            weight = LazyMatrix(left, right, weights[0].dtype)
        else:
            weight = self.join(weights)
        return LayerMatrix(weight, self.join(biases) if biases else None)

    def parts(self, joined: LayerMatrix, like: list[LayerMatrix]) -> list[LayerMatrix]:
        """Return the parts of all layers, from that of all: the inverse of ``gradient``."""
        if len(like) == 1 or self.join is None:
            return [joined]
        first = [part.weight for part in like]
        if isinstance(joined.weight, LazyMatrix):
            rows = zip(joined.weight.left.unbind(), joined.weight.right.unbind(), strict=True)
            weights: list[Any] = [LazyMatrix(left, right, joined.weight.dtype) for left, right in rows]
        else:
            weights = list(self.split(joined.weight, first))
        if joined.bias is None:
            return [LayerMatrix(weight) for weight in weights]
        biases = self.split(joined.bias, first)
        return [LayerMatrix(*pair) for pair in zip(weights, biases, strict=True)]


def _sizes(joined: Tensor, like: list[Any]) -> Any:
    return joined.split([one.shape[0] for one in like])


APART = Joining(None, lambda joined, like: [joined])
"""Each block alone."""


STACKED = Joining(stacked, lambda joined, like: joined.unbind())
"""Along a new leading axis."""


ALONG_UNITS = Joining(torch.cat, _sizes, any_output=True)
"""One after another along the axis of units."""
