"""Trees as one flat vector and back: all leaves one after another, each row-major."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import wide, widest
from lrkfac.core.base.leaves import tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.types import Tree


def flat_size(tree: Tree) -> int:
    """Return the number of all entries of a tree."""
    return sum(math.prod(leaf.shape) for leaf in tree_leaves(tree))


def flattened(tree: Tree) -> Tensor:
    """Return the entries of all leaves, ``[d]``, in the widest dtype of them, at least float32."""
    leaves = [wide(leaf) for leaf in tree_leaves(tree)]
    dtype = widest(*[leaf.dtype for leaf in leaves])
    return torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])


def unflattened(x: Tensor, like: Tree) -> Tree:
    """Return a vector ``[d]`` as a tree with the shapes and dtypes of another: the inverse of ``flattened``."""
    leaves, structure = tree_flatten(like)
    parts = x.split([leaf.numel() for leaf in leaves])
    shaped = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return tree_unflatten(structure, shaped)
