"""Numbers that say how one block is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.eager import has_values
from lrkfac.core.curvature.blocks import Held
from lrkfac.core.curvature.ekfac import CorrectedState
from lrkfac.core.curvature.kronecker import KroneckerState
from lrkfac.core.curvature.spectra import Damped, Spectrum, damped, spectrum, squared_distance

SIDES = ("B", "A")
"""The factors of a product, in the order in which states hold them."""


WHOLE = "F"
"""The block itself."""


class LayerDiagnosis(NamedTuple):
    """Of one layer, by part: the factors ``"A"`` and ``"B"`` of a product, and ``"F"``, the layer's block.

    Attributes:
        numbers: For each part, by name, tensors ``[]``; see ``diagnose``.
        eigenvalues: For each part that eigenpairs are held of, their eigenvalues, ``[r]``, largest first; of all
            groups and units together.
        rest: For these, the trace that the eigenpairs leave out, ``[]``.
    """

    numbers: dict[str, dict[str, Tensor]]
    eigenvalues: dict[str, Tensor]
    rest: dict[str, Tensor]


def of_block(held: Held, before: Held | None) -> LayerDiagnosis:
    """What a block holds, and by how much that has changed since ``before``."""
    state, old = held.state, None if before is None else before.state
    found = LayerDiagnosis({}, {}, {})
    if isinstance(state, KroneckerState):
        sides = [
            _add(found, side, state[i], held.inverse[i], held.dampings[..., i], None if old is None else old[i])
            for i, side in enumerate(SIDES)
        ]
        effective, largest, smallest = (x * y for x, y in zip(*sides, strict=True))
        found.numbers[WHOLE] = {
            "effective_dimension": effective.sum(),
            "condition": largest.amax() / smallest.amin(),
        }
    elif isinstance(state, CorrectedState):
        for i, side in enumerate(SIDES):
            _add(found, side, state.factors[i], None, None, None if old is None else old.factors[i])
        _add(found, WHOLE, state, held.inverse, held.dampings, None)
    else:
        _add(found, WHOLE, state, held.inverse, held.dampings, old)
    return found


def needed_rank(state: Any, share: float) -> Tensor:
    """The least number of eigenpairs that hold a share of the trace in each group; all, where these hold less."""
    eigenvalues, rest = _of_each(state, spectrum, state)
    needed = share * (eigenvalues.sum(dim=1) + rest)
    fewer = (eigenvalues.cumsum(dim=1) < needed[:, None]).sum(dim=1).amax()
    return (fewer + 1).clamp(max=eigenvalues.shape[1])


def _add(found: LayerDiagnosis, part: str, state: Any, inverse: Any, damping: Tensor | None, old: Any) -> Damped | None:
    """Adds what is known of a part; returns what is damped, ``[n]`` for ``n`` groups or units."""
    known: Spectrum = _of_each(state, spectrum, state)
    held, rest = known.eigenvalues.sum(), known.rest.sum()
    total = held + rest
    found.eigenvalues[part] = known.eigenvalues.reshape(-1).sort(descending=True).values
    found.rest[part] = rest
    numbers = found.numbers[part] = {
        "rank": held.new_full((), known.eigenvalues.numel()),
        "captured": torch.where(total > 0, held / torch.where(total > 0, total, 1), 1),
    }
    if old is not None:
        apart, size = (x.sum() for x in _of_each(state, squared_distance, state, old))
        numbers["drift"] = torch.where(size > 0, (apart / torch.where(size > 0, size, 1)).sqrt(), apart.sqrt())
    if damping is None:
        return None
    lead = _steps(state).shape
    of_each = damping.reshape(damping.shape + (1,) * (len(lead) - damping.ndim)).expand(lead)
    shifted: Damped = _of_each(state, damped, state, inverse, of_each, known.eigenvalues.reshape(*lead, -1))
    numbers["damping"] = damping.mean()
    numbers["effective_dimension"] = shifted.effective.sum()
    numbers["condition"] = shifted.largest.amax() / shifted.smallest.amin()
    return shifted


def _of_each(state: Any, function: Callable[..., Any], *args: Any) -> Any:
    """A function of each group and unit, along one leading axis; of what has none, along an axis of length 1."""
    lead = _steps(state).ndim
    flat = optree.tree_map(lambda x: x.flatten(0, lead - 1) if lead else x[None], args)
    return vmap(function)(*flat)


def is_before(state: Any, other: Any) -> bool:
    """Whether a state has seen fewer batches than another, where that is known without waiting for a device."""
    if isinstance(state, KroneckerState):
        return is_before(state.output, other.output)
    steps, others = _steps(state), _steps(other)
    return has_values(steps) and has_values(others) and bool((steps < others).any())


def _steps(state: Any) -> Tensor:
    """The counts of batches, which have the shape of groups and units."""
    steps: Tensor = state.steps
    return steps
