"""Parameters and examples in general position: no two alike, so that what depends on what can be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree


def generic_parameters(params: Tree) -> Tree:
    """Return parameters near the given ones, none of which is zero or equal to another.

    Their values do not matter, but their size does: deep networks must not overflow.
    """

    def moved(x: Tensor) -> Tensor:
        x = x.detach()
        fan_in = max(x[0].numel() if x.ndim > 1 else x.numel(), 1)
        size = x.square().mean().sqrt()
        size = torch.where(size > 0, size, min(0.3, fan_in**-0.5))
        return x + 0.1 * size * _normal(x, 1)

    return optree.tree_map(lambda x: moved(x) if x.numel() else x.detach(), params)


@dataclass(frozen=True)
class Examples:
    """Any number of different examples like those of a batch.

    Attributes:
        inputs: The batch.
        axes: The axis of the examples of each leaf that has one, by path.
        number: The number of examples of the batch.
        bold: Whether those that are added may differ more: by as much as numbers vary, and, on the CPU, integers that
            are all equal by one, which the model may refuse. (Elsewhere that is an error from which nothing recovers.)
    """

    inputs: Tree
    axes: Mapping[str, int]
    number: int
    bold: bool = False

    @staticmethod
    def of(inputs: Tree, axes: Mapping[str, int], bold: bool = False) -> Examples:
        """Return the examples of a batch."""
        leaves = dict(zip(paths(inputs), optree.tree_leaves(inputs), strict=True))
        lengths = [leaves[path].shape[axis] for path, axis in axes.items() if path in leaves]
        return Examples(inputs, axes, lengths[0] if lengths else 0, bold)

    def some(self, n: int, moved: bool = False, replaced: Sequence[str] = (), other: int = 0) -> Tree:
        """Return inputs of ``n`` examples.

        Args:
            n: The number; those of the batch come first, and again, changed, where it has fewer.
            moved: Whether each stands in the place of the one before it, and the first in the last place.
            replaced: Paths of the leaves of which the first example is another one.
            other: The number of that; ``n`` is one that is not among the others.
        """
        leaves, structure = optree.tree_flatten(self.inputs)
        names = paths(self.inputs)
        changed = []
        for number, (path, x) in enumerate(zip(names, leaves, strict=True)):
            if path in self.axes:
                examples = self._different(x, self.axes[path], n + 1, number)
                order = [other if path in replaced else 0, *range(1, n)]
                if moved:
                    order = [*order[1:], order[0]]
                x = examples.index_select(self.axes[path], torch.tensor(order, device=x.device))
            changed.append(x)
        return optree.tree_unflatten(structure, changed)

    def _different(self, x: Tensor, axis: int, n: int, seed: int) -> Tensor:
        """Return ``n`` examples of a leaf; repeated ones are moved a little, or their entries change places."""
        index = torch.arange(n, device=x.device) % max(self.number, 1)
        x = x.detach().index_select(axis, index).movedim(axis, 0)
        flat = x.reshape(n, -1)
        if not flat.shape[1]:
            return x.movedim(0, axis)
        repeated = torch.stack([(flat[:i] == flat[i]).all(dim=1).any() for i in range(n)])
        repeated = repeated.reshape(-1, *[1] * (x.ndim - 1))
        other = self._moved(x, seed) if x.is_floating_point() or x.is_complex() else self._redrawn(x, seed)
        return torch.where(repeated, other, x).movedim(0, axis)

    def _moved(self, x: Tensor, seed: int) -> Tensor:
        """Return numbers near those given."""
        size = x.abs().square().mean().sqrt().clamp(min=0.1)
        return x + (1.0 if self.bold else 0.1) * size * _normal(x, seed)

    def _redrawn(self, x: Tensor, seed: int) -> Tensor:
        """Return numbers in the range of those given; of two numbers at least, where this is tried."""
        uniform = _uniform(x, seed)
        if x.dtype == torch.bool:
            return uniform < 0.5
        low, high = x.min(), x.max()
        high = torch.where(high > low, high, high + int(self.bold and x.device.type == "cpu"))
        return (low + (uniform * (high - low + 1)).floor().clamp(max=high - low)).to(x.dtype)


def _normal(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = torch.complex64 if like.is_complex() else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=dtype, device="cpu").to(like.device, like.dtype)


def _uniform(like: Tensor, seed: int) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(like.device)
