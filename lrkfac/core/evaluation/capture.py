"""One forward pass that records the inputs of layers, and the way back to their outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrkfac.core.base.by_autograd import constant
from lrkfac.core.base.leaves import tree_flatten, tree_unflatten
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.auxiliary import join_tensors, split_tensors
from lrkfac.core.evaluation.by_example import ProbeGradients, example_transpose, examples_of_uses
from lrkfac.core.evaluation.derivatives import transposed
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.evaluation.specs import Specs
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.matrix import prepared
from lrkfac.core.layers.probes import zero_probes
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.layers.tracing import run_captured

LayerRows = dict[str, tuple[Uses, Uses]]
"""Inputs and output gradients of each layer, in the standard form of ``lrkfac.core.layers``."""


Variables = tuple[dict[int, Tensor], dict[str, list[Tensor]]]
"""Free leaves of the parameters by their index, and the probes of each source."""


OfUses = dict[str, list[Tensor]]
"""One tensor for each use of each source."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A forward pass with a probe at each output of some layers.

    Attributes:
        layers: The layers captured; their weights and biases are constants of the pass.
        outputs: The model's outputs, ``[N, ...]`` for each head.
        aux: The model's auxiliary result, or ``None``.
        recorded: Inputs of each source's operations.
        results: Outputs of those of the sources that were asked for.
        probes: The probes, zeros.
        examples: The number of examples.
        transpose: From a cotangent of ``outputs`` to the gradients of the free leaves and at the probes.
        by_example: From a cotangent to the gradients of single examples in those parameters that are layers as a whole.
    """

    layers: Layers
    outputs: list[Tensor]
    aux: Any
    recorded: Mapping[str, Sequence[Tensor]]
    results: Mapping[str, Sequence[Tensor]]
    probes: ProbeGradients
    examples: int
    transpose: Callable[[list[Tensor]], tuple[dict[int, Tensor], ProbeGradients]]
    by_example: Callable[[list[Tensor]], ProbeGradients]

    @property
    def uneven(self) -> bool:
        """Whether heads have different numbers of examples."""
        return any(f.shape[0] != self.outputs[0].shape[0] for f in self.outputs[1:])

    def probe_gradients(self, cotangent: list[Tensor]) -> ProbeGradients:
        """Return the gradients at the probes of all layers."""
        of_probes = self.transpose(cotangent)[1] if self.layers.followed.layers else {}
        return {**of_probes, **self.by_example(cotangent)}

    def rows(self, gradients: ProbeGradients) -> LayerRows:
        """Return the rows of all layers, from gradients at the probes with a leading axis ``k``."""
        rows = {}
        for layer in self.layers:
            inputs = tuple([self.recorded[source][use] for source, use in layer.sites])
            output_gradients = tuple([gradients[source][use] for source, use in layer.sites])
            rows[layer.name] = prepared(layer, inputs, output_gradients, self.examples)
        return rows

    def single_rows(self, gradients: ProbeGradients) -> LayerRows:
        """Return the rows of all layers, from gradients at the probes without that axis: ``k = 1``."""
        return self.rows({source: [g[None] for g in uses] for source, uses in gradients.items()})


def capture(
    objective: Objective,
    layers: Layers,
    params: Tree,
    inputs: Tree,
    specs: Specs,
    free: bool = True,
    kept: Collection[str] = (),
) -> Captured:
    """Run the model once, with probes at the outputs of ``layers``.

    Backward passes compute gradients at the probes and those of the free leaves: parameters that belong to no captured
    layer, or are one as a whole. Another layer's gradient follows from its rows, so that its weight takes no part.

    Args:
        objective: The model and its likelihood.
        layers: The layers to capture; may be none, and the pass is then a plain one.
        params: Where to evaluate.
        inputs: Of the batch.
        specs: Shapes of these layers' outputs, at least.
        free: Whether there are free leaves; else gradients at the probes are all.
        kept: The sources of which outputs are kept.
    """
    leaves, structure = tree_flatten(params)
    followed = layers.followed
    covered = followed.covered
    if layers.autograd:  # whose model may differentiate by free leaves, and change inputs into such
        leaves, inputs, free = constant(leaves), constant(inputs), True
    variables: Variables = (
        {i: leaf for i, leaf in enumerate(leaves) if i not in covered} if free else {},
        zero_probes(specs, followed.sources),
    )
    static: list[Any] = []

    def run(variables: Variables) -> tuple[list[Tensor], tuple[list[Tensor], OfUses, OfUses]]:
        free_leaves, probes = variables
        merged = tree_unflatten(structure, [free_leaves.get(i, leaf) for i, leaf in enumerate(leaves)])
        if followed.layers:
            result, records = run_captured(objective.model, followed, merged, inputs, probes)
        else:  # without the function mode that follows weights
            result, records = objective.run(merged, inputs), {}
        outputs, aux = objective.split(result)
        recorded = {source: [use.input for use in uses] for source, uses in records.items()}
        results = {source: [use.output for use in uses] for source, uses in records.items() if source in kept}
        return outputs, (split_tensors(aux, static), recorded, results)

    outputs, transpose, (tensors, recorded, results) = transposed(run, variables, layers.autograd)
    examples = (layers.examples(inputs) if layers.layers else None) or outputs[0].shape[0]
    aux = join_tensors(tensors, static)
    probes = dict(variables[1])
    for layer in layers.jacobians:
        leaf, source = leaves[layer.weight.index], layer.sites[0][0]
        lengths = examples_of_uses(layers, outputs, len(layer.sites))
        probes[source] = [leaf.new_zeros(()).expand(length, *leaf.shape) for length in lengths]
        recorded[source] = [leaf.new_ones(())] * len(lengths)
    by_example = example_transpose(objective, layers, params, inputs, outputs)
    return Captured(layers, outputs, aux, recorded, results, probes, examples, transpose, by_example)
