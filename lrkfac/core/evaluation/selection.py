"""Which statistics an evaluation takes: of which layers, of which examples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.eager import has_values
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.statistics import Statistics

Asked = bool | Tensor | Collection[str]
"""All statistics or none, of some examples by number, or of some layers by name."""


def chosen(statistics: Any, names: frozenset[str]) -> tuple[bool | Tensor, frozenset[str]]:
    """What ``evaluate`` is asked for: statistics or not, or the numbers of examples; and of which of the named layers.

    Raises:
        ValueError: If it names no layer, or does not choose examples by number.
        TypeError: If it is something else.
    """
    if isinstance(statistics, Tensor):
        if statistics.ndim != 1 or statistics.dtype not in (torch.int64, torch.int32) or not statistics.numel():
            raise ValueError(
                "statistics: expected True, False, names of layers or the numbers of some examples, int64 of shape "
                f"[n], got {statistics.dtype} of shape {tuple(statistics.shape)}"
            )
        return statistics, names
    if isinstance(statistics, bool):
        return statistics, names
    if not isinstance(statistics, tuple | list | set | frozenset) or not all(isinstance(x, str) for x in statistics):
        raise TypeError(
            "statistics: expected True, False, a tuple of names of layers or a tensor of numbers of examples, got "
            f"{statistics!r}"
        )
    unknown = sorted(set(statistics) - names)
    if unknown:
        raise ValueError(f"statistics: no layers {unknown}; expected some of {sorted(names)}")
    return len(statistics) > 0, frozenset(statistics)


def of_layers(found: Statistics, names: frozenset[str]) -> Statistics:
    """The statistics of some layers; those of the others are empty."""
    parts = [{name: uses if name in names else () for name, uses in part.items()} for part in found[:2]]
    return Statistics(parts[0], parts[1], found.scale)


def examples_of(tree: Tree, numbers: Tensor, size: int) -> Tree:
    """The examples of these numbers; what has not the batch of this size as its leading axis stays whole.

    Raises:
        ValueError: If a number is none of an example (where they are on the CPU and known).
    """
    if has_values(numbers) and not (numbers.min() >= 0 and numbers.max() < size):
        raise ValueError(f"statistics: expected numbers of examples from 0 to {size - 1}, got {numbers.tolist()}")

    def taken(x: Any) -> Any:
        return x[numbers.long()] if isinstance(x, Tensor) and x.ndim and x.shape[0] == size else x

    return optree.tree_map(taken, tree, none_is_leaf=True)
