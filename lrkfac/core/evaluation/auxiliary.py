"""Auxiliary results of a model, split for ``torch.func``, which takes tensors alone."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor


def split_tensors(aux: Any, static: list[Any]) -> list[Tensor]:
    """Return the tensors of ``aux``; ``static`` is filled with the structure and all other leaves."""
    leaves, structure = optree.tree_flatten(aux, none_is_leaf=True)
    static[:] = [[None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], structure]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def join_tensors(tensors: list[Tensor], static: list[Any]) -> Any:
    """Invert ``split_tensors``."""
    others, structure = static
    remaining = iter(tensors)
    return optree.tree_unflatten(structure, [next(remaining) if other is None else other[0] for other in others])
