"""How tensors of a model move when a few examples change places, and where the examples are in them by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.containers import result_leaves
from lrkfac.core.base.dtypes import most_precise
from lrkfac.core.layers.generic import Examples, places
from lrkfac.core.layers.placement import BatchAxis, Placement
from lrkfac.core.layers.uses import Use

Run = Callable[..., tuple[Any, Mapping[str, Sequence[Use]]]]
"""``run(inputs, probes={})`` returns the model's result and the uses of its weights by label; ``probes`` are tensors to
add to the output of a use, by its label and number.
"""


def rounding(x: Tensor) -> float:
    """Return what differences between entries must exceed to count, relative to the largest entry."""
    return 8 * torch.finfo(x.dtype).eps if x.is_floating_point() or x.is_complex() else 0.0


class Runs(NamedTuple):
    """The model's tensors for some examples, and for the same ones in other places."""

    examples: int
    result: Any
    uses: Mapping[str, Sequence[Use]]
    moved_result: Any
    moved_uses: Mapping[str, Sequence[Use]]


class Seen(NamedTuple):
    """Runs at two numbers of examples, or at that of the batch, and what their examples are."""

    examples: Examples
    runs: list[Runs]


def first_output(result: Any) -> Tensor:
    """Return the first tensor of a model's result."""
    output: Tensor = result_leaves(result)[0]
    return output


def output_axis(runs: Sequence[Runs]) -> BatchAxis | None:
    """Return the place of the examples in the first output, along its leading axis."""
    return axis_of(_outputs(runs), range(1))


def single_outputs(runs: Sequence[Runs]) -> bool:
    """Return whether the first output has one entry for each example along its leading axis.

    Outputs that are equal for these few examples, such as those behind rectifiers that are all zero, show it by their
    length: whether others would move is no matter of the description.
    """
    outputs = _outputs(runs)
    axis = axis_of(outputs, range(1)) or _constant_axis(outputs, range(1))
    return axis is not None and not axis.shared and axis.outer * axis.inner == 1


def _outputs(runs: Sequence[Runs]) -> list[tuple[int, Tensor, Tensor]]:
    return [(x.examples, first_output(x.result), first_output(x.moved_result)) for x in runs]


def placement(name: str, number: int, use: Use, runs: Sequence[Runs]) -> tuple[Placement | None, bool]:
    """Return where the examples are at a use, and whether it has one value for all and no axis for them."""
    kind, options = use.call.kind, use.call.options
    axes: list[BatchAxis | None] = []
    for side in (1,) if kind.unit_wise else (0, 1):
        pairs: list[tuple[int, Tensor, Tensor]] = []
        candidates: Sequence[int] = ()
        for x in runs:
            both = [of[name][number] for of in (x.uses, x.moved_uses)]
            tensors = [one.output if side else one.call.input for one in both]
            (first, candidates), (moved, _) = (kind.places(tensor, side, options) for tensor in tensors)
            pairs.append((x.examples, first, moved))
        axis = axis_of(pairs, candidates) or _constant_axis(pairs, candidates)
        mapped = axis is not None and axis.shared and use.mapped  # no probe can be longer than an axis of vmap
        if mapped or (axis is None and _constant(pairs) and len({first.shape for _, first, _ in pairs}) == 1):
            return None, True
        axes.append(axis)
    if any(axis is None for axis in axes):
        return None, False
    return (axes[0], axes[-1]), False  # type: ignore[return-value]


def axis_of(pairs: Sequence[tuple[int, Tensor, Tensor]], candidates: Sequence[int]) -> BatchAxis | None:
    """Return the one place of the examples that explains how tensors moved, of each number of examples.

    Where nothing moved, since examples happen to be equal there, a place must only fit the length of its axis.
    """
    common: set[BatchAxis] | None = None
    for n, first, moved in pairs:
        if first.shape != moved.shape:
            return None
        if not _constant([(n, first, moved)]):
            here = {place for axis in candidates if axis < first.ndim for place in _moved_along(axis, n, first, moved)}
            common = here if common is None else common & here
    fitting = [x for x in common or () if all(t.shape[x.axis] == x.outer * n * x.inner for n, t, _ in pairs)]
    return fitting[0] if len(fitting) == 1 else None


def _moved_along(axis: int, n: int, first: Tensor, moved: Tensor) -> Iterator[BatchAxis]:
    length = first.shape[axis]
    if not first.numel() or length % n:
        return
    x, y = (comparable(z).movedim(axis, 0).reshape(length, -1) for z in (first, moved))
    for outer in range(1, length // n + 1):
        if (length // n) % outer:
            continue
        inner = length // n // outer
        before, after = (z.reshape(outer, n, inner, -1) for z in (x, y))
        expected = before[:, places(n)]
        spread = (before - expected).abs().amax()
        if bool(spread > rounding(first) * x.abs().amax()) and bool((after - expected).abs().amax() <= 1e-3 * spread):
            yield BatchAxis(axis, outer, inner)


def _constant(pairs: Sequence[tuple[int, Tensor, Tensor]]) -> bool:
    """Return whether the tensors do not depend on the examples."""
    return all(x.shape == y.shape and torch.equal(comparable(x), comparable(y)) for _, x, y in pairs)


def _constant_axis(pairs: Sequence[tuple[int, Tensor, Tensor]], candidates: Sequence[int]) -> BatchAxis | None:
    """Return the place of the examples in tensors that are equal for all of them: the one axis that grows with them."""
    if len(pairs) < 2 or not _constant(pairs):
        return None
    shapes = [(n, x.shape) for n, x, _ in pairs]
    growing = [axis for axis in candidates if len({shape[axis] for _, shape in shapes}) > 1]
    if len(growing) == 1 and all(shape[growing[0]] == n for n, shape in shapes):
        return BatchAxis(growing[0])
    if not growing and 0 in candidates and len(shapes[0][1]) > 1 and shapes[0][1][0] == 1:
        return BatchAxis(shared=True)
    return None


def comparable(x: Tensor) -> Tensor:
    """Return real numbers in double precision, finite ones; complex ones as pairs."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.detach().to(most_precise(x.device)).nan_to_num()
