"""Whether examples depend on each other: one after another is replaced, or one copy of a row that all share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.containers import result_leaves
from lrkfac.core.layers.generic import Examples
from lrkfac.core.layers.movement import Run, Seen, comparable, first_output, output_axis, rounding
from lrkfac.core.layers.placement import BatchAxis

OUTLIER = 8.0
"""How much larger an example may be than others: those that depend on a maximum then change with it."""


def independence(run: Run, seen: Seen) -> tuple[bool | None, tuple[str, ...]]:
    """Return whether an output depends on one example alone; if not, the leaf through which others come in, if one."""
    axes = tuple(seen.examples.axes)
    alone = _apart(run, seen, axes)
    if alone is False and len(axes) > 1:
        for path in axes:
            if _apart(run, seen, [other for other in axes if other != path]):
                return False, (path,)
    return (alone if output_axis(seen.runs) is not None or alone is False else None), ()


def _apart(run: Run, seen: Seen, paths: Sequence[str]) -> bool | None:
    """Return whether only an example's own outputs differ where it is replaced; ``None`` where none ever do."""
    n, base, place = seen.runs[0].examples, seen.runs[0].result, _place(seen)
    if place is None:
        return None
    any_differs = False
    for at in range(n):
        outlier = OUTLIER if at % 2 else -OUTLIER
        others = [(i, 1.0) for i in range(n) if i != at]
        differs_here = False
        for other, scale in [(n, outlier), (n, 1.0), *others]:
            if other != n and differs_here:
                break  # the others only where those made no difference
            try:
                result, _ = run(seen.examples.replaced(n, at, paths, other, scale))
            except Exception:
                continue  # such as numbers out of range
            differs = _differ(place, n, base, result)
            if _others(differs, at):
                return False
            differs_here = differs_here or bool(differs[at])
        any_differs = any_differs or differs_here
    return True if any_differs else None


def does_not_depend(run: Run, inputs: Any, axes: Mapping[str, int]) -> bool:
    """Return whether a run's results are the same when examples along some axes are others."""
    examples = Examples.of(inputs, axes)
    before, _ = run(examples.some(4))
    changed = [run(examples.replaced(4, 0, tuple(axes), 4, scale))[0] for scale in (1.0, OUTLIER)]
    return all(_equal(before, after) for after in changed)


def takes_copies(run: Run, seen: Seen, site: tuple[str, int]) -> bool:
    """Return whether the output of a use that all examples share may stand once for each example.

    The model must give the same outputs with copies, and a change of one copy must change the outputs of its example
    alone.
    """
    n, place = seen.runs[0].examples, _place(seen)
    output = seen.runs[0].uses[site[0]][site[1]].output
    if place is None or output.shape[:1] != (1,):
        return False
    zero = output.new_zeros((n, *output.shape[1:]))
    inputs = seen.examples.some(n)
    try:
        copies, _ = run(inputs, {site: zero})
        if not _equal(seen.runs[0].result, copies):
            return False
        any_differs = False
        for i in range(n):
            probe = zero.clone()
            slope = torch.linspace(0.5, 1.5, output[0].numel(), device="cpu").to(output)
            probe[i] = output[0].abs().amax() * slope.view_as(output[0])
            differs = _differ(place, n, copies, run(inputs, {site: probe})[0])
            if _others(differs, i):
                return False
            any_differs = any_differs or bool(differs[i])
    except Exception:
        return False
    return any_differs


def _place(seen: Seen) -> BatchAxis | None:
    """Return the place of the examples in the outputs, or else that of one entry for each, where lengths allow it."""
    place = output_axis(seen.runs) or BatchAxis()
    length = first_output(seen.runs[0].result).shape[:1]
    return place if length == (seen.runs[0].examples * place.outer * place.inner,) else None


def _others(differs: Tensor, at: int) -> bool:
    return bool(differs[:at].any() or differs[at + 1 :].any())


def _equal(one: Any, other: Any) -> bool:
    """Return whether two results are the same but for rounding."""
    for x, y in zip(result_leaves(one), result_leaves(other), strict=True):
        if isinstance(x, Tensor):
            scale = 1000 * rounding(x) * comparable(x).abs().amax() if x.numel() else 0.0
            if x.shape != y.shape or bool(((comparable(x) - comparable(y)).abs() > scale).any()):
                return False
    return True


def _differ(place: BatchAxis, n: int, result: Any, other: Any) -> Tensor:
    """Return for each example whether its outputs differ, those along the leading axis."""
    lengths = {first_output(result).shape[0]}
    differ = torch.zeros(n, dtype=torch.bool, device=first_output(result).device)
    for x, y in zip(result_leaves(result), result_leaves(other), strict=True):
        if not isinstance(x, Tensor) or not x.ndim or x.shape[0] not in lengths or x.shape != y.shape or not x.numel():
            continue
        relative = rounding(x)
        x, y = (place.in_front(comparable(z), n) for z in (x, y))
        differ |= ((x - y).abs() > relative * x.abs().amax()).reshape(n, -1).any(dim=1)
    return differ
