"""Random vectors for estimates, from an explicit source."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Generator, Tensor

from lrkfac.core.base.flat import flattened
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.actions import Action, SymmetricMap, action, as_columns, check_vector


def probes_of(
    operator: SymmetricMap, count: int, generator: Generator | None, noise: Tree | None, like: Tree | None
) -> tuple[Action, Tensor, Tree]:
    """Return the operator on flat columns, random columns ``[d, count]``, and what one of them looks like as a tree.

    Raises:
        ValueError: If not exactly one of ``generator`` and ``noise`` is given, or shapes do not fit.
        TypeError: If an argument has the wrong type.
    """
    if (generator is None) == (noise is None):
        got = "neither" if noise is None else "both"
        raise ValueError(f"generator, noise: expected exactly one of them, so that no randomness is hidden, got {got}")
    if noise is not None:
        columns, like = as_columns(noise, "noise")
        if columns.shape[1] != count:
            raise ValueError(f"noise: expected {count} vectors, got {columns.shape[1]}")
        return action(operator, like), columns, like
    if not isinstance(generator, Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    like = _like(operator) if like is None else like
    first = check_vector(like, "like")
    drawn = torch.randn(count, first.shape[0], generator=generator, dtype=first.dtype, device=generator.device)
    return action(operator, like), drawn.to(first.device).mT, like


def _like(operator: Any) -> Tree:
    """Return a tree or vector that an operator takes, from what it is made of.

    Raises:
        ValueError: If it does not tell.
    """
    params = getattr(operator, "params", None)
    if params is not None:
        return params
    dimension = getattr(operator, "dimension", None)
    leaves = [x for x in tree_leaves(operator) if isinstance(x, Tensor)] if not optree.tree_is_leaf(operator) else []
    if not isinstance(dimension, int) or not leaves:
        raise ValueError(
            "like: expected a vector [d] or tree as the operator takes it, since the operator does not tell, got none"
        )
    return flattened([leaves[0].new_zeros(dimension)])
