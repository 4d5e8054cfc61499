"""Shapes of the layers' outputs, known for the latest inputs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.containers import Rebuilding
from lrkfac.core.base.leaves import tree_leaves, tree_structure
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.probes import OutputSpec, output_specs

Specs = dict[str, list[OutputSpec]]
"""Shape, dtype and device of each output of each source."""


class SpecCache:
    """The output shapes for the latest input signatures, at most ``size`` of them; copies and pickles start empty."""

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self._entries: OrderedDict[Any, Specs] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[SpecCache], tuple[int]]:
        return SpecCache, (self.size,)

    def specs(self, objective: Objective, layers: Layers, params: Tree, inputs: Tree) -> Specs:
        """Return the output shapes of all layers that are operations; a forward pass without computation finds them.

        Raises:
            ValueError: If the model has hidden effects, or another path than when the layers were described.
        """
        layers = layers.followed
        if torch.compiler.is_compiling():
            return output_specs(objective.model, layers, params, inputs) if layers.layers else {}
        key = signature(params, inputs)
        if key is None:
            return output_specs(objective.model, layers, params, inputs)
        if isinstance(objective.model, Rebuilding):
            key = (*key, objective.model.form)  # the model may ask for the type
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        specs = output_specs(objective.model, layers, params, inputs)
        with self._lock:
            self._entries[key] = specs
            if len(self._entries) > self.size:
                self._entries.popitem(last=False)
        return specs


def signature(params: Tree, inputs: Tree) -> tuple[Any, ...] | None:
    """Return all that the shapes of a model's outputs depend on, hashable; ``None`` where an input may hide some."""
    leaves = tree_leaves((params, inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if not all(isinstance(leaf, bool | int | float | complex | str) for leaf in others):
        return None
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted({x.device.type for x in tensors})
    ]
    forms = tuple([(tuple(x.shape), x.dtype, x.device) for x in tensors])
    return forms, tuple([(type(x), x) for x in others]), tree_structure(inputs), tuple(autocast)
