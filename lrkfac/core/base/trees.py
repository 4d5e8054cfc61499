"""Arithmetic of trees that ``optree`` lacks; leaves may be lazy matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.dtypes import in_dtype, wide
from lrkfac.core.base.eager import in_one_call
from lrkfac.core.base.lazy import LazyMatrix, add_multiple
from lrkfac.core.base.leaves import leaves_like, tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.per_parameter import is_number
from lrkfac.core.base.private_torch import added_all, multiplied_all
from lrkfac.core.base.stacks import evenly_spaced, neighbours, stacked
from lrkfac.core.base.summand import Summand, summed
from lrkfac.core.base.types import PerParameter, Tree


def vdot(x: Tree, y: Tree, weights: Tree | None = None) -> Tensor:
    """Return the inner product of two trees, ``[]``: the sum over leaves of ``weight * sum(x * y)``.

    Weights are 1 by default. Half-precision leaves are summed in float32. Of leaves of ``y`` that are ``Summand``, the
    products are summed over processes.
    """
    products = _summed_products(tree_leaves(optree.tree_map(_vdot, x, y)), tree_leaves(y))
    if weights is not None:
        products = [weight * one for weight, one in zip(tree_leaves(weights), products, strict=True)]
    return torch.stack(products).sum() if products else torch.zeros(())


def add_scaled(x: Tree, scale: PerParameter, y: Tree) -> Tree:
    """Return ``x + scale * y`` leaf by leaf, in the dtype of ``x``; lazy matrices in ``x`` stay lazy."""

    def one(a: Any, b: Any, c: float | Tensor) -> Any:
        if isinstance(a, LazyMatrix):
            return a.plus(_materialized(b), c)
        if isinstance(b, LazyMatrix):
            return in_dtype(b.scaled(c).plus(a).unrounded(), a.dtype)
        return in_dtype(add_multiple(a, c, b), a.dtype)

    if not is_number(scale):
        return optree.tree_map(one, x, y, scale)
    leaves, structure = tree_flatten(x)
    others = leaves_like(structure, y)
    if not isinstance(scale, Tensor) and in_one_call(*leaves, *others):
        return tree_unflatten(structure, added_all(leaves, scale, others))
    return tree_unflatten(structure, [one(a, b, scale) for a, b in zip(leaves, others, strict=True)])


def scaled(scale: PerParameter, x: Tree) -> Tree:
    """Return ``scale * x`` leaf by leaf, in the dtype of ``x``."""

    def one(a: Any, c: float | Tensor) -> Any:
        return a.scaled(c) if isinstance(a, LazyMatrix) else in_dtype(c * a, a.dtype)

    if not is_number(scale):
        return optree.tree_map(one, x, scale)
    leaves, structure = tree_flatten(x)
    if in_one_call(*leaves, *([scale] if isinstance(scale, Tensor) else [])):
        return tree_unflatten(structure, multiplied_all(leaves, scale))
    return tree_unflatten(structure, [one(a, scale) for a in leaves])


def zeros_like(x: Tree) -> Tree:
    """Return a tree of zeros with the shapes, dtypes and devices of ``x``."""
    return optree.tree_map(
        lambda a: a.left.new_zeros(a.shape, dtype=a.dtype) if isinstance(a, LazyMatrix) else torch.zeros_like(a), x
    )


def selected(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """Return ``new`` where the condition ``[]`` holds, else ``old``; leaves that are the same object pass.

    Leaves that lie at equal distances in memory, as those of layers in a stack do, are chosen in one call.
    """
    leaves, structure = optree.tree_flatten(new)
    chosen, changed = dict(enumerate(leaves)), []
    for i, (x, y) in enumerate(zip(leaves, structure.flatten_up_to(old), strict=True)):
        if x is not y:
            changed.append((i, x, y))
    for group in neighbours([x for _, x, _ in changed]):
        numbers, xs, ys = zip(*[changed[k] for k in group], strict=True)
        x = evenly_spaced(xs)
        if x is None:
            chosen.update({i: torch.where(condition, x, y) for i, x, y in zip(numbers, xs, ys, strict=True)})
        else:
            chosen.update(zip(numbers, torch.where(condition, x, stacked(ys)).unbind(), strict=True))
    return optree.tree_unflatten(structure, list(chosen.values()))


def zero_unless(condition: Tensor, x: Tree) -> Tree:
    """Return the tree where the condition ``[]`` holds, else zeros, also in the place of NaN and infinity."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, LazyMatrix):
            return torch.where(condition, leaf, 0)
        return LazyMatrix(one(leaf.left), one(leaf.right), leaf.dtype, tuple([(c, one(t)) for c, t in leaf.terms]))

    return optree.tree_map(one, x)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Return ``weight * x``, and 0 where the weight is 0: a batch in which nothing counts has no finite numbers."""
    return torch.where(weight > 0, weight * wide(x), 0)


def materialize(x: Tree) -> Tree:
    """Return the tree with each ``LazyMatrix`` computed, so that all leaves are tensors.

    Parts of gradients, as ``evaluator(..., scatter=True)`` leaves them, are summed over processes, which all call it.

    Examples:
        >>> import torch
        >>> from lrkfac import LazyMatrix
        >>> gradient = LazyMatrix(torch.ones(5, 2), torch.ones(5, 3), torch.float32)
        >>> materialize({"weight": gradient, "bias": torch.zeros(2)})["weight"]
        tensor([[5., 5., 5.],
                [5., 5., 5.]])

    Args:
        x: A tree of tensors and lazy matrices, such as ``evaluation.grads``.

    Returns:
        A tree of the same structure; tensors pass.

    Raises:
        TypeError: If a leaf is neither tensor nor ``LazyMatrix``.
    """
    summands = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Summand)]
    sums = iter(summed(summands))
    return optree.tree_map(lambda leaf: next(sums) if isinstance(leaf, Summand) else _materialized(leaf), x)


def copied_or_lazy(x: Tree, y: Tree) -> Tree:
    """Return ``y`` in leaves that may be changed without a change of ``y``: lazy matrices where ``x`` has them, else
    copies.
    """
    leaves, structure = tree_flatten(y)
    if in_one_call(*leaves, *tree_leaves(x)):
        return tree_unflatten(structure, multiplied_all(leaves, 1))
    return optree.tree_map(lambda a, b: LazyMatrix.of(b) if isinstance(a, LazyMatrix) else b.clone(), x, y)


def all_finite(x: Tree) -> Tensor:
    """Return whether all entries are finite, ``[]``; of lazy matrices, all that they are made of."""
    parts = optree.tree_map(lambda a: (a.left, a.right, a.terms) if isinstance(a, LazyMatrix) else a, x)
    leaves = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    extremes = _extremes(leaves)
    return torch.stack(extremes).isfinite().all() if extremes else torch.ones((), dtype=torch.bool)


def all_squarable(x: Sequence[Tensor]) -> Tensor:
    """Return whether no entry is larger than 2⁻¹⁰ times the root of the largest number, ``[]``: 1.8e16 in float32.

    So the square of the length of millions of them is finite. At least one is at hand.
    """
    extremes = _extremes(x)
    limit = min(torch.finfo(one.dtype).max for one in extremes) ** 0.5 * 2**-10
    return torch.stack(extremes).abs().amax() <= limit  # false for NaN


def _extremes(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the extremes of each leaf, in one pass; ``isfinite`` takes four and twenty times as long on a CPU."""
    return [wide(one) for leaf in leaves if leaf.numel() for one in torch.aminmax(leaf)]


def _materialized(leaf: Any) -> Any:
    if isinstance(leaf, LazyMatrix):
        return leaf.dense()
    if not isinstance(leaf, Tensor):
        raise TypeError(f"materialize: expected x to be a tree of tensors, got {type(leaf).__name__} in it")
    return leaf


def _summed_products(products: list[Tensor], leaves: list[Any]) -> list[Tensor]:
    """Return inner products with leaves; those with summands, of which this process has a part, in one sum."""
    parts = {i: leaf.processes for i, leaf in enumerate(leaves) if isinstance(leaf, Summand)}
    if parts:
        (whole,) = next(iter(parts.values())).sum([torch.stack([products[i] for i in parts])])
        for i, one in zip(parts, whole.unbind(), strict=True):
            products[i] = one
    return products


def _vdot(a: Any, b: Any) -> Tensor:
    b = b.part if isinstance(b, Summand) else b
    if isinstance(a, LazyMatrix) or isinstance(b, LazyMatrix):
        a, b = (a, b) if isinstance(a, LazyMatrix) else (b, a)
        return wide(a).vdot(wide(b))
    return torch.dot(_row(wide(a)), _row(wide(b)))


def _row(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else x.reshape(-1)


def counter(x: Tree) -> Tensor:
    """Return a counter at 0: int64, ``[]``, on the device of the first leaf of ``x``."""
    leaves = tree_leaves(x)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)
