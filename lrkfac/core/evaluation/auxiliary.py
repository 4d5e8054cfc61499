"""What a model returns beside its outputs, in the form that ``torch.func`` takes."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor


def without_others(aux: Any, rest: list[Any]) -> list[Tensor]:
    """The tensors of ``aux``, which is all that torch.func takes; ``rest`` becomes what is left of it."""
    leaves, structure = optree.tree_flatten(aux, none_is_leaf=True)
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    rest[:] = [others, structure]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def with_others(tensors: list[Tensor], rest: list[Any]) -> Any:
    """The inverse of ``without_others``."""
    others, structure = rest
    remaining = iter(tensors)
    return optree.tree_unflatten(structure, [next(remaining) if other is None else other[0] for other in others])
