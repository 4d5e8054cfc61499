"""Numbers of one block: captured trace, damping, effective dimension, condition, drift."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.eager import has_values
from lrkfac.core.curvature.blocks import BlockState
from lrkfac.core.curvature.spectra import WHOLE, Damped, Part, Spectrum, damped, squared_distance


class LayerDiagnosis(NamedTuple):
    """Numbers of one layer, by part: the factors ``"A"`` and ``"B"`` of a product, and ``"F"``, the layer's block.

    Attributes:
        numbers: For each part, by name, tensors ``[]``; see ``diagnose``.
        eigenvalues: For each part the eigenvalues of its eigenpairs, ``[r]``, largest first; of all groups and units
            together.
        rest: For these, the trace that the eigenpairs leave out, ``[]``.
    """

    numbers: dict[str, dict[str, Tensor]]
    eigenvalues: dict[str, Tensor]
    rest: dict[str, Tensor]


def of_block(state: BlockState, before: BlockState | None) -> LayerDiagnosis:
    """Return the numbers of a block, and by how much it has changed since ``before``."""
    diagnosis = LayerDiagnosis({}, {}, {})
    parts = state.average.parts(state.inverse, state.dampings)
    old = [] if before is None else before.average.parts(before.inverse, before.dampings)
    known = [_add(diagnosis, part, old[i].state if old else None) for i, part in enumerate(parts)]
    if WHOLE not in diagnosis.numbers:  # a product of its parts
        effective, largest, smallest = (math.prod(x) for x in zip(*[x for x in known if x is not None], strict=True))
        diagnosis.numbers[WHOLE] = {
            "effective_dimension": effective.sum(),
            "condition": largest.amax() / smallest.amin(),
        }
    return diagnosis


def needed_rank(state: Any, share: float) -> Tensor:
    """Return the least number of eigenpairs that hold a share of the trace in each group, at most all."""
    eigenvalues, rest = _of_each(state, lambda one: one.spectrum(), state)
    needed = share * (eigenvalues.sum(dim=1) + rest)
    fewer = (eigenvalues.cumsum(dim=1) < needed[:, None]).sum(dim=1).amax()
    return (fewer + 1).clamp(max=eigenvalues.shape[1])


def _add(diagnosis: LayerDiagnosis, part: Part, old: Any) -> Damped | None:
    """Add what is known of a part; return its damped numbers, ``[n]`` for ``n`` groups or units."""
    name, state, inverse, damping = part
    known = Spectrum(*_of_each(state, lambda one: one.spectrum(), state))
    captured, rest = known.eigenvalues.sum(), known.rest.sum()
    total = captured + rest
    diagnosis.eigenvalues[name] = known.eigenvalues.reshape(-1).sort(descending=True).values
    diagnosis.rest[name] = rest
    numbers = diagnosis.numbers[name] = {
        "rank": captured.new_full((), known.eigenvalues.numel()),
        "captured": torch.where(total > 0, captured / torch.where(total > 0, total, 1), 1),
    }
    if old is not None and hasattr(state, "inner"):
        apart, size = (x.sum() for x in _of_each(state, squared_distance, state, old))
        numbers["drift"] = torch.where(size > 0, (apart / torch.where(size > 0, size, 1)).sqrt(), apart.sqrt())
    if damping is None:
        return None
    lead = state.steps.shape
    of_each = damping.reshape(damping.shape + (1,) * (len(lead) - damping.ndim)).expand(lead)
    shifted: Damped = _of_each(state, damped, state, inverse, of_each, known.eigenvalues.reshape(*lead, -1))
    numbers["damping"] = damping.mean()
    numbers["effective_dimension"] = shifted.effective.sum()
    numbers["condition"] = shifted.largest.amax() / shifted.smallest.amin()
    return shifted


def _of_each(state: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Map a function over groups and units, along one leading axis; where there is none, along an axis of length 1."""
    lead = state.steps.ndim
    flat = optree.tree_map(lambda x: x.flatten(0, lead - 1) if lead else x[None], args)
    return vmap(function)(*flat)


def is_before(average: Any, other: Any) -> bool:
    """Return whether an average has seen fewer batches, where that is known without waiting for a device."""
    steps, others = average.factor_states()[0].steps, other.factor_states()[0].steps
    return has_values(steps) and has_values(others) and bool((steps < others).any())
