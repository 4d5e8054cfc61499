"""One captured forward pass through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.matrix import prepared
from lrkfac.core.layers.statistics import Uses

AtProbes = Mapping[str, Sequence[Tensor]]
"""Gradients at the probes of each source."""


Form = dict[str, tuple[Uses, Uses]]
"""Inputs and output gradients of each layer, in the standard form of ``lrkfac.core.layers``."""


@dataclass(frozen=True)
class Captured:
    """One forward pass through the model.

    Attributes:
        layers: Whose uses were captured.
        outputs: What came out of each head, ``[N, ...]``.
        recorded: What each source's operations received.
        probes: Those that were added, zero.
        transpose: The way back, from a cotangent of ``outputs`` to gradients of parameters and at probes.
    """

    layers: Layers
    outputs: list[Tensor]
    recorded: Mapping[str, Sequence[Tensor]]
    probes: AtProbes
    transpose: Callable[[list[Tensor]], tuple[dict[int, Tensor], AtProbes]]

    def standard_form(self, at_probes: AtProbes) -> Form:
        """Of all layers, from gradients at the probes with a leading axis ``k``."""
        return standard_form(self.layers, self.recorded, at_probes, self.outputs)

    def standard_form_of_one(self, at_probes: AtProbes) -> Form:
        """The same from gradients without that axis, ``k = 1``."""
        return self.standard_form({source: [g[None] for g in uses] for source, uses in at_probes.items()})


def standard_form(
    layers: Layers, recorded: Mapping[str, Sequence[Tensor]], at_probes: AtProbes, outputs: list[Tensor]
) -> Form:
    """What was captured of some layers, as ``lrkfac.core.layers`` takes it; gradients with a leading axis ``k``."""
    form = {}
    for layer in layers:
        inputs = tuple([recorded[source][use] for source, use in layer.sites])
        gradients = tuple([at_probes[source][use] for source, use in layer.sites])
        form[layer.name] = prepared(layer, inputs, gradients, outputs[0].shape[0])
    return form
