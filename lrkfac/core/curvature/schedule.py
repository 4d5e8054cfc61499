"""Refresh schedules: the layers that take statistics in each step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.layers.description import Layers, check_layers


def round_robin_refresh(layers: Layers, every: int) -> RoundRobin:
    """Return a schedule that refreshes each layer once in ``every`` steps, a part of them at a time.

    No step then takes much longer than another. The parts are about equal in ``Σ d_in + d_out``; with fewer layers than
    ``every``, the turns are spread over the steps. Estimators that take a backward pass take it at every turn, so that
    all turns together cost more than one refresh of all layers; ``"empirical"`` and ``"forward_only"`` take none.
    ``torch.compile`` makes a graph of each part.

    Args:
        layers: From ``find_layers``.
        every: Number of steps in which each layer has one turn, at least 1.

    Returns:
        A function from the number of a step to a tuple of names for ``evaluate(..., layers=...)``: all of them at step
        0, and ``()`` where it is no layer's turn.

    Raises:
        ValueError: If ``every`` is below 1; when called, if the step is below 0.
        TypeError: If ``every``, or a step, is no integer, or ``layers`` is not from ``find_layers``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> layers = lrkfac.find_layers(model, params, torch.randn(8, 3))
        >>> refreshed = lrkfac.round_robin_refresh(layers, 4)
        >>> [refreshed(step) for step in range(5)]
        [('0', '1'), (), ('1',), (), ('0',)]
    """
    check_layers(layers)
    check_integer(every, "every")
    parts: list[list[str]] = [[] for _ in range(min(every, len(layers)))]
    sizes = [0] * len(parts)
    for layer in sorted(layers, key=lambda layer: -layer.groups * (layer.d_in + layer.d_out)):
        lightest = sizes.index(min(sizes))
        parts[lightest].append(layer.name)
        sizes[lightest] += layer.groups * (layer.d_in + layer.d_out)
    return RoundRobin(tuple(layer.name for layer in layers), tuple(map(tuple, parts)), every)


@dataclass(frozen=True)
class RoundRobin:
    """Layers in turns; ``round_robin_refresh`` makes it.

    Attributes:
        names: Of all layers.
        parts: Names of the layers that have a turn together.
        every: Number of steps in which each part has one turn.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    every: int

    def __call__(self, step: int) -> tuple[str, ...]:
        """Return the names of the layers to refresh in a step."""
        if isinstance(step, Tensor):
            raise TypeError(
                "step: expected an integer >= 0, got a tensor; the layers refreshed decide what is computed, and must "
                "not depend on a tensor's value"
            )
        check_integer(step, "step", 0)
        if step == 0:
            return self.names
        # Part i has its turn at the step i * every // len(parts) of each round.
        turn = step % self.every
        part = -(-turn * len(self.parts) // self.every)
        due = part < len(self.parts) and part * self.every // len(self.parts) == turn
        return self.parts[part] if due else ()
