"""The layers and the examples of which an evaluation takes statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag
from lrkfac.core.base.eager import has_values
from lrkfac.core.base.leaves import tree_flatten, tree_unflatten
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.statistics import Statistics


def check_selection(statistics: Any, names: Any, examples: Any, layers: Layers) -> None:
    """Raise unless ``evaluate`` can take these statistics.

    Raises:
        ValueError: If a name is none of a layer, or ``examples`` has another shape than ``[n]``.
        TypeError: If an argument has another type or dtype.
    """
    check_flag(statistics, "statistics")
    if names is not None:
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"layers: expected a tuple of names of layers or None, got {names!r}")
        known = {layer.name for layer in layers}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"layers: no layers {unknown}; expected some of {sorted(known)}")
    if examples is None:
        return
    if not isinstance(examples, Tensor):
        raise TypeError(
            "examples: expected the numbers of some examples, an int64 tensor [n] such as torch.randperm(size)[:n], "
            f"or None, got {examples!r}"
        )
    if examples.dtype != torch.int64:
        raise TypeError(f"examples: expected numbers of some examples, int64, got {examples.dtype}")
    if examples.ndim != 1 or not examples.numel():
        raise ValueError(
            "examples: expected the numbers of some examples, int64 of shape [n], got the shape "
            f"{tuple(examples.shape)}"
        )


def select_layers(statistics: Statistics, names: tuple[str, ...] | None) -> Statistics:
    """Return the statistics with those of all but the named layers empty; ``None`` keeps all."""
    if names is None:
        return statistics
    parts = [{name: uses if name in names else () for name, uses in part.items()} for part in statistics[:2]]
    return Statistics(parts[0], parts[1], *statistics[2:])


def select_examples(layers: Layers, inputs: Tree, targets: list[Tensor], examples: Tensor) -> tuple[Tree, list[Tensor]]:
    """Return inputs and targets of some examples.

    Raises:
        ValueError: If it is not known which axes hold the examples, their number differs between inputs and targets, or
            a number is out of range (on the CPU, where values are known).
    """
    axes = layers.batch_axes
    if axes is None:
        raise ValueError(
            "examples: it is not known which axes of the inputs hold the examples; call find_layers() with a batch of "
            "different examples, or with batch_axes="
        )
    size, by_path = targets[0].shape[0], dict(axes)
    if has_values(examples) and not (examples.min() >= 0 and examples.max() < size):
        raise ValueError(f"examples: expected numbers of examples from 0 to {size - 1}, got {examples.tolist()}")
    leaves, structure = tree_flatten(inputs)
    selected = []
    for path, x in zip(paths(inputs), leaves, strict=True):
        axis = by_path.get(path)
        if axis is not None and x.shape[axis] != size:
            raise ValueError(
                f"examples: expected {size} examples, as in the targets, along axis {axis} of the inputs"
                f"{f' at {path!r}' if path else ''}, got the shape {tuple(x.shape)}"
            )
        selected.append(x if axis is None else x.index_select(axis, examples))
    return tree_unflatten(structure, selected), [y[examples] for y in targets]
