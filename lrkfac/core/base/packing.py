"""Trees as a few long rows: small leaves joined, so that arithmetic takes few calls, large ones as they are.

Joining a large leaf would be a pass over its memory, and a row of all parameters is often too large for an allocator to
keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.eager import changes_in_place
from lrkfac.core.base.types import Tree

LARGE = 2**16
"""Entries of a leaf that is a row of its own."""


Rows = tuple[Tensor, ...]
"""One row of all small leaves, if there are any, and one for each large leaf."""


def as_rows(x: Tree, stacked: bool = False) -> Rows:
    """Return the leaves of a tree as rows, each at least float32; rows of large leaves share their memory.

    With ``stacked``, leaves and rows have one more axis in front.
    """
    leaves = [wide(leaf) for leaf in optree.tree_leaves(x)]
    rows = [
        leaf.reshape(*leaf.shape[:1], math.prod(leaf.shape[1:])) if stacked else leaf.reshape(-1) for leaf in leaves
    ]
    small, large = ([row for row in rows if (row.shape[-1] >= LARGE) == one] for one in (False, True))
    return (*([torch.cat(small, dim=-1)] if small else []), *large)


def from_rows(rows: Rows, like: Tree) -> Tree:
    """Return rows as a tree with the shapes and dtypes of another, of the same memory where dtypes agree."""
    leaves, structure = optree.tree_flatten(like)
    sizes = [leaf.numel() for leaf in leaves if leaf.numel() < LARGE]
    small, large = iter(rows[0].split(sizes) if sizes else ()), iter(rows[1:] if sizes else rows)
    parts = [next(small if leaf.numel() < LARGE else large) for leaf in leaves]
    shaped = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return optree.tree_unflatten(structure, shaped)


def products(x: Rows, y: Rows) -> Tensor:
    """Return the inner products of stacked rows, ``[k, n]`` each, with other rows, ``[k]``; of two rows, ``[]``."""
    parts = [a @ b for a, b in zip(x, y, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def weighted_squares(x: Rows, weights: Rows | None = None) -> Tensor:
    """Return the inner product of each of some stacked rows with itself, ``[k]``, each entry times its weight."""
    second = x if weights is None else multiplied(x, weights)
    parts = [(a @ b.mT).diagonal() for a, b in zip(x, second, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def multiplied(x: Rows, y: Rows) -> Rows:
    """Return the products of all entries."""
    return tuple([a * b for a, b in zip(x, y, strict=True)])


def combined(a: Tensor, x: Rows, b: Tensor, y: Rows) -> Rows:
    """Return ``a x + b y`` in memory of its own, with 0 in the place of what is not finite in ``a x``."""
    return _sums(_finite(tuple([a.to(u.dtype) * u for u in x])), b, y)


def disposable(x: Tree) -> list[bool]:
    """Return for each row of a tree, once materialized, whether it is a large one that nothing else refers to."""
    leaves = optree.tree_leaves(x)
    large = [not isinstance(leaf, Tensor) and changes_in_place() for leaf in leaves if math.prod(leaf.shape) >= LARGE]
    return [*([False] if len(large) < len(leaves) else []), *large]


def accumulated(condition: Tensor, x: Rows, spent: Sequence[bool], decay: Tensor, y: Rows) -> Rows:
    """Return ``x + decay y`` where the condition ``[]`` holds and ``x`` is finite, else ``y``.

    It takes the memory of rows of ``x`` that may be ``spent``.
    """
    own = tuple([u if one else torch.nan_to_num(u, 0.0, 0.0, 0.0) for u, one in zip(x, spent, strict=True)])
    return _sums(cleared_unless(condition, own), torch.where(condition, decay, 1), y)


def cleared_unless(condition: Tensor, x: Rows) -> Rows:
    """Return rows where the condition ``[]`` holds, and they are finite then, else zeros; they may change in place.

    Not by ``where``, which takes five times as long on a CPU.
    """
    return tuple([u.mul_(condition) if changes_in_place() else u * condition for u in _finite(x)])


def _finite(x: Rows) -> Rows:
    """Return rows with 0 in the place of what is not finite; they may change in place."""
    zeros = 0.0, 0.0, 0.0
    return tuple([u.nan_to_num_(*zeros) if changes_in_place() else torch.nan_to_num(u, *zeros) for u in x])


def _sums(x: Rows, scale: Tensor, y: Rows) -> Rows:
    """Return ``x + scale y`` in the memory of ``x``."""
    pairs = [(u, v, scale.to(u.dtype)) for u, v in zip(x, y, strict=True)]
    return tuple([u.addcmul_(v, c) if changes_in_place() else torch.addcmul(u, v, c) for u, v, c in pairs])
