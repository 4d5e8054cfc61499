"""Which layers are refreshed in which step: in turns, or where the factors have turned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.checks import need_integer
from lrkfac.core.factors import DenseState, DiagonalState
from lrkfac.core.low_rank import LowRankPlusDiagonalState, LowRankState
from lrkfac.core.spectra import inner, thin
from lrkfac.core.tree import need_layers
from lrkfac.core.types import Layers


def staggered(layers: Layers, every: int) -> Callable[[int], bool | tuple[str, ...]]:
    """Each layer once in ``every`` steps, a part of them at a time, so that no step is much longer than another.

    ``refreshed = staggered(layers, 10)``, then ``evaluate(params, inputs, targets, statistics=refreshed(step))``. The
    parts are about equal in ``Σ d_in + d_out``; of fewer layers than ``every``, the steps are spread. Each part is its
    own graph to ``torch.compile``. The estimators that take a backward pass take it in every step of a part, so that
    all together cost more than a refresh of all layers at once; ``"empirical"`` and ``"forward_only"`` take none.

    Returns:
        From the number of a step to names of layers, or ``False`` where it is no layer's turn, or ``True`` at step 0.

    Raises:
        ValueError: If ``every`` is below 1, or a step below 0.
        TypeError: If it, or a step, is no integer, or ``layers`` are none.
    """
    need_layers(layers)
    need_integer(every, "every")
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
        need_integer(step, "step", 0)
        return step == 0 or turns.get(step % every, False)

    return refreshed


def staleness(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Tensor]:
    """By how much each layer's factors have turned: the larger of the angles of the two, in radians, ``[]``.

    The angle between a factor ``M`` then and now is that between matrices, ``cos = tr(M M') / (‖M‖ ‖M'‖)``, which
    follows from thin products: 0 where only the scale has changed, π/2 between orthogonal ranges. Unlike the angle
    between two bases, it does not depend on how eigenvectors of nearly equal eigenvalues turn among each other. A
    layer whose factors turn little from one refresh to the next may be refreshed more seldom. In float32, angles below
    1e-3 are rounding.

    Args:
        before: ``state.factors`` of a ``PreconditionState``.
        after: The same later on.

    Raises:
        ValueError: If the layers differ, or what holds them.
        TypeError: If an argument is no mapping of states.
    """
    for what, given in (("before", before), ("after", after)):
        if not isinstance(given, Mapping) or not all(isinstance(x, Tensor) for x in optree.tree_leaves(dict(given))):
            raise TypeError(f"{what}: expected state.factors of a PreconditionState, got {type(given).__name__}")
    if set(before) != set(after):
        raise ValueError(f"after: expected factors of the layers {sorted(before)}, got {sorted(after)}")
    if optree.tree_structure(dict(before)) != optree.tree_structure(dict(after)):
        raise ValueError("after: expected factors held as those of before, got others; pass two states of one chain")
    return {name: torch.stack(_angles(before[name], after[name])).amax() for name in before}


def _angles(old: Any, new: Any) -> list[Tensor]:
    """Of all factors within two states; the largest of a factor's groups or units."""
    if isinstance(old, DenseState | DiagonalState | LowRankState | LowRankPlusDiagonalState):
        squares = _inner(old, old), _inner(new, new)
        lengths = (squares[0] * squares[1]).clamp(min=torch.finfo(old[0].dtype).tiny).sqrt()
        angle = (_inner(old, new) / lengths).clamp(-1, 1).acos()
        return [torch.where((squares[0] == 0) & (squares[1] == 0), 0, angle).amax()]
    return [angle for x, y in zip(old, new, strict=True) if isinstance(x, tuple) for angle in _angles(x, y)]


def _inner(old: Any, new: Any) -> Tensor:
    """``tr(M M')``, over the last axes."""
    if isinstance(old, DenseState):
        return (old.matrix * new.matrix).sum(dim=(-2, -1))
    if isinstance(old, DiagonalState):
        return (old.diagonal * new.diagonal).sum(dim=-1)
    return inner(thin(old), thin(new))
