"""Which layers are refreshed in which step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lrkfac.core.base.arguments import check_integer
from lrkfac.core.layers.description import Layers, check_layers


def round_robin_refresh(layers: Layers, every: int) -> Callable[[int], bool | tuple[str, ...]]:
    """Each layer once in ``every`` steps, a part of them at a time, so that no step is much longer than another.

    ``refreshed = round_robin_refresh(layers, 10)``, then
    ``evaluate(params, inputs, targets, statistics=refreshed(step))``. The parts are about equal in ``Σ d_in + d_out``;
    of fewer layers than ``every``, the steps are spread. Each part is its own graph to ``torch.compile``. The
    estimators that take a backward pass take it in every step of a part, so that all together cost more than a refresh
    of all layers at once; ``"empirical"`` and ``"forward_only"`` take none.

    Returns:
        From the number of a step to names of layers, or ``False`` where it is no layer's turn, or ``True`` at step 0.

    Raises:
        ValueError: If ``every`` is below 1, or a step below 0.
        TypeError: If it, or a step, is no integer, or ``layers`` are none.
    """
    check_layers(layers)
    check_integer(every, "every")
    parts: list[list[str]] = [[] for _ in range(min(every, len(layers)))]
    sizes = [0] * len(parts)
    for layer in sorted(layers, key=lambda layer: -layer.groups * (layer.d_in + layer.d_out)):
        lightest = sizes.index(min(sizes))
        parts[lightest].append(layer.name)
        sizes[lightest] += layer.groups * (layer.d_in + layer.d_out)
    turns = {i * every // len(parts): tuple(part) for i, part in enumerate(parts)}

    def refreshed(step: int) -> bool | tuple[str, ...]:
        if isinstance(step, Tensor):
            raise TypeError("step: expected an integer >= 0, got a tensor; which layers it is decides what is computed")
        check_integer(step, "step", 0)
        return step == 0 or turns.get(step % every, False)

    return refreshed
