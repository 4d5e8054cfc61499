"""Parameters and examples in general position: no two alike, so that what depends on what can be seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def places(n: int) -> list[int]:
    """Return the numbers of ``n`` examples that have changed places.

    All but the last move on by one place: nothing but rows in the order of the examples moves with them, not even rows
    that are moved on or turned round themselves.
    """
    return [*range(1, n - 1), 0, n - 1] if n > 2 else [1, 0]


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

    def some(self, n: int, moved: bool = False) -> Tree:
        """Return inputs of ``n`` examples: those of the batch, and again, changed, where it has fewer.

        Args:
            n: The number.
            moved: Whether they have changed places, as ``places`` says.
        """
        return self._inputs(n, lambda path, examples: examples[places(n) if moved else list(range(n))])

    def replaced(self, n: int, at: int, paths: Sequence[str], other: int, scale: float = 1.0) -> Tree:
        """Return ``n`` examples of which one is another in some leaves.

        Args:
            n: The number.
            at: Which is replaced.
            paths: The leaves.
            other: By which: number ``n`` is none of the others.
            scale: By what its numbers are multiplied, those that are no integers.
        """

        def changed(path: str, examples: Tensor) -> Tensor:
            order = [other if i == at and path in paths else i for i in range(n)]
            chosen = examples[order]
            if path in paths and chosen.is_floating_point():
                chosen[at] *= scale
            return chosen

        return self._inputs(n, changed)

    def _inputs(self, n: int, change: Callable[[str, Tensor], Tensor]) -> Tree:
        """Return the inputs with each leaf of examples changed; ``change`` sees ``n + 1`` examples in front."""
        leaves, structure = optree.tree_flatten(self.inputs)
        changed = []
        for number, (path, x) in enumerate(zip(paths(self.inputs), leaves, strict=True)):
            if path in self.axes:
                axis = self.axes[path]
                x = change(path, self._different(x, axis, n + 1, number).movedim(axis, 0)).movedim(0, axis)
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
        size = x.abs().square().mean().sqrt()
        size = torch.where(size > 0, size, 0.1).to(size.dtype)
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
