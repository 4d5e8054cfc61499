"""Changes of a model's outputs along tangents, by what is known of its thin layers from the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.private_torch import version
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.capture import Captured
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import LinearOptions
from lrkfac.core.layers.linearized import KnownUse, run_linearized
from lrkfac.core.layers.matrix import layer_matrix
from lrkfac.core.layers.padding import with_constant_padding
from lrkfac.core.layers.tracing import Recorded


@dataclass(frozen=True, eq=False, repr=False)
class ThinPass:
    """Inputs and outputs of linear layers with fewer rows than weights in one forward pass.

    Along a tangent, the output of such a layer changes by its input times the change of the weight, which needs no
    copy of that in a stack of tangents, and by the change of its input times the weight. The output is known.

    Attributes:
        layers: All layers of the model.
        recorded: The use of each layer, by name.
        versions: How often each parameter had been changed in place.
    """

    layers: Layers
    recorded: Mapping[str, Recorded]
    versions: list[int]

    @staticmethod
    def of(layers: Layers, thin: Sequence[Layer], captured: Captured, params: Tree) -> ThinPass | None:
        """Return what is known from a captured pass with these parameters; ``None`` where nothing is."""
        plain = [one for one in thin if not one.mapped and one.options[0] == LinearOptions()]
        if not plain or layers.autograd or torch.compiler.is_compiling():
            return None
        sites = {one.name: one.sites[0] for one in plain}
        uses = {
            name: Recorded(captured.recorded[source][use], captured.results[source][use])
            for name, (source, use) in sites.items()
        }
        return ThinPass(layers, uses, _versions(params))

    def fits(self, params: Tree) -> bool:
        """Return whether the parameters are still those of the forward pass: a module's step changes them in place."""
        return self.versions == _versions(params)

    def along(
        self, objective: Objective, params: Tree, inputs: Tree, tangents: Sequence[Tree], function: Callable[..., Any]
    ) -> Any:
        """Return ``function(outputs, change)`` for each tangent, stacked, from one forward derivative of them all."""
        leaves, structure = optree.tree_flatten(params)
        each = [optree.tree_leaves(tangent) for tangent in tangents]
        uses = {self.layers[name].sites[0][0]: self._use(self.layers[name], leaves, each) for name in self.recorded}
        known = {p.index for name in self.recorded for p in (self.layers[name].weight, self.layers[name].bias) if p}
        free = [i for i in range(len(leaves)) if i not in known]
        nothing = leaves[0].new_zeros(())  # that there is something to differentiate by

        def along_one(changes: list[Tensor], of_uses: dict[str, Tensor]) -> Any:
            def run(free_leaves: list[Tensor], nothing: Tensor) -> list[Tensor]:
                own = dict(zip(free, free_leaves, strict=True))
                merged = optree.tree_unflatten(structure, [own.get(i, leaf) for i, leaf in enumerate(leaves)])
                changing = {source: use._replace(change=of_uses[source]) for source, use in uses.items()}
                with with_constant_padding(self.layers):
                    result = run_linearized(objective.model, self.layers, merged, inputs, changing)
                return objective.split(result)[0]

            at = [leaves[i] for i in free], nothing
            return function(*jvp(run, at, (changes, torch.zeros_like(nothing))))

        stacked = [torch.stack([one[i] for one in each]) for i in free]
        return vmap(along_one)(stacked, {source: use.change for source, use in uses.items()})

    def _use(self, layer: Layer, leaves: list[Tensor], tangents: list[list[Tensor]]) -> KnownUse:
        """Return the use of a layer, with its changes along all tangents for the input as it was."""
        input, output = self.recorded[layer.name]

        def change(tangent: list[Tensor]) -> Tensor:
            matrix = layer_matrix(layer, tangent)
            dtype = widest(input.dtype, matrix.weight.dtype)
            bias = None if matrix.bias is None else matrix.bias.to(dtype)
            return F.linear(input.to(dtype), matrix.weight.to(dtype), bias).to(output.dtype)

        weight = layer_matrix(layer, leaves).weight
        return KnownUse(output, weight, torch.stack([change(tangent) for tangent in tangents]))


def _versions(params: Tree) -> list[int]:
    return [0 if leaf.is_inference() else version(leaf) for leaf in optree.tree_leaves(params)]
