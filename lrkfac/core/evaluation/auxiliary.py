"""Auxiliary results of a model, split for ``torch.func``, which takes tensors alone."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.containers import closed, opened


def split_tensors(aux: Any, static: list[Any]) -> list[Tensor]:
    """Return the tensors of ``aux``; ``static`` is filled with the structure and all other leaves.

    Raises:
        TypeError: If an object holds tensors out of sight.
    """
    aux, form = opened(aux, "model: aux")
    leaves, structure = optree.tree_flatten(aux, none_is_leaf=True)
    static[:] = [[None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], structure, form]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def join_tensors(tensors: list[Tensor], static: list[Any]) -> Any:
    """Invert ``split_tensors``."""
    others, structure, form = static
    remaining = iter(tensors)
    leaves = [next(remaining) if other is None else other[0] for other in others]
    return closed(optree.tree_unflatten(structure, leaves), form)
