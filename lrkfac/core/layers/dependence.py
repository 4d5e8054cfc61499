"""Where the examples are in what a model reads and computes: seen from what moves when they change places.

A few examples are run twice, the second time each in the place of the one before it. What holds one entry for each
example then moves with them, whatever its axis and whatever else shares the axis; lengths alone decide nothing. A third
run with one example replaced shows whether others depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.containers import result_leaves
from lrkfac.core.base.private_torch import is_fake, is_transformed
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.generic import Examples
from lrkfac.core.layers.placement import BatchAxis, Placement
from lrkfac.core.layers.uses import Use

Run = Callable[[Tree], tuple[Any, Mapping[str, Sequence[Use]]]]
"""From inputs to the model's result and the uses of its weights, by label."""

SIZES = (4, 6)
"""Numbers of examples; both even, for models that pair them."""


def _rounding(x: Tensor) -> float:
    """Return what differences between entries must exceed to count, relative to the largest entry."""
    return 8 * torch.finfo(x.dtype).eps if x.is_floating_point() or x.is_complex() else 0.0


@dataclass(frozen=True)
class Batch:
    """The examples of a model.

    Attributes:
        axes: The axis of the batch of each leaf of the inputs that has one, by path; ``None`` if unknown.
        independent: Whether the outputs of each example depend on no other; ``None`` if unknown.
        single: Whether outputs have one entry for each example along their leading axis.
        placements: Of each use, by label; ``None`` for one whose rows are not known by example.
        shared: Of each use, whether it has one value for all examples and no axis for them.
    """

    axes: Mapping[str, int] | None
    independent: bool | None
    single: bool
    placements: Mapping[str, Sequence[Placement | None]]
    shared: Mapping[str, Sequence[bool]]


UNKNOWN = Batch(None, None, False, {}, {})


class Runs(NamedTuple):
    """The model's tensors for some examples, and for the same ones moved on by one place."""

    examples: int
    result: Any
    uses: Mapping[str, Sequence[Use]]
    moved_result: Any
    moved_uses: Mapping[str, Sequence[Use]]


class Seen(NamedTuple):
    """Runs at two numbers of examples, or at that of the batch, and what their examples are."""

    examples: Examples
    runs: list[Runs]


def find_batch(
    run: Run,
    inputs: Tree,
    uses: Mapping[str, Sequence[Use]],
    axes: Mapping[str, int] | None = None,
    constant: Sequence[str] = (),
) -> Batch:
    """Find the examples of a model.

    Args:
        run: Runs the model with parameters in general position.
        inputs: Of a batch of any size, with values.
        uses: The uses of its weights, as a run without values saw them.
        axes: The axes of the batch by the path of a leaf of the inputs, where the user gives them.
        constant: Paths of leaves that hold no examples.

    Returns:
        What the runs show; unknown where the model cannot take other batches.
    """
    leaves = dict(zip(paths(inputs), optree.tree_leaves(inputs), strict=True))
    tensors = {path: x for path, x in leaves.items() if isinstance(x, Tensor) and x.ndim and path not in constant}
    if any(is_transformed(x) or is_fake(x) for x in tensors.values()):
        return UNKNOWN
    for hypothesis in [axes] if axes is not None else _hypotheses(tensors):
        seen = _seen(run, inputs, hypothesis, uses)
        if seen is None:
            continue
        independent, dependent = _independence(run, seen)
        if axes is None and dependent:
            kept = {path: axis for path, axis in hypothesis.items() if path not in dependent}
            fewer = _seen(run, inputs, kept, uses)
            if fewer is not None:
                hypothesis, seen, independent = kept, fewer, True
        pairs = {
            name: [_placement(name, i, use, seen.runs) for i, use in enumerate(group)] for name, group in uses.items()
        }
        place = _output_axis(seen.runs)
        return Batch(
            hypothesis,
            independent,
            place is not None and place.outer * place.inner == 1,
            {name: [place for place, _ in group] for name, group in pairs.items()},
            {name: [shared for _, shared in group] for name, group in pairs.items()},
        )
    return UNKNOWN


def _hypotheses(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, int]]:
    """Yield sets of leaves that may hold the batch along one axis: all of a length, then all but one, then one."""
    for axis in (0, 1):
        lengths = dict.fromkeys(x.shape[axis] for x in tensors.values() if x.ndim > axis)
        for length in lengths:
            alike = [path for path, x in tensors.items() if x.ndim > axis and x.shape[axis] == length]
            yield dict.fromkeys(alike, axis)
            if len(alike) > 2:
                yield from (dict.fromkeys([p for p in alike if p != path], axis) for path in alike)
            if len(alike) > 1:
                yield from ({path: axis} for path in alike)


def _seen(run: Run, inputs: Tree, axes: Mapping[str, int], uses: Mapping[str, Sequence[Use]]) -> Seen | None:
    """Return runs at two numbers of examples, or at that of the batch; ``None`` if nothing moves with the examples."""
    partly = None
    for bold in (False, True):
        examples = Examples.of(inputs, axes, bold)
        for sizes in (SIZES, (examples.number,)):
            runs = _runs(run, examples, sizes, uses) if min(sizes) > 1 else None
            if runs is not None and _output_axis(runs) is not None:
                return Seen(examples, runs)
            if runs is not None and partly is None and _inputs_move(runs, uses):
                partly = Seen(examples, runs)
    return partly


def _runs(run: Run, examples: Examples, sizes: Sequence[int], uses: Mapping[str, Sequence[Use]]) -> list[Runs] | None:
    """Return the runs, or ``None`` if the model cannot take such examples or takes another path."""
    counts = {name: len(group) for name, group in uses.items()}
    runs = []
    for n in sizes:
        try:
            first, moved = run(examples.some(n)), run(examples.some(n, moved=True))
        except Exception:
            return None  # such as a model for one size of batch, or leaves that hold no examples
        if any({name: len(group) for name, group in of.items()} != counts for _, of in (first, moved)):
            return None
        runs.append(Runs(n, *first, *moved))
    return runs


def _inputs_move(runs: Sequence[Runs], uses: Mapping[str, Sequence[Use]]) -> bool:
    """Return whether the input of a layer moves with the examples, along its leading axis."""
    for name in uses:
        pairs = [(x.examples, x.uses[name][0].call.input, x.moved_uses[name][0].call.input) for x in runs]
        if _axis(pairs, range(1)) is not None:
            return True
    return False


def _first_output(result: Any) -> Tensor:
    output: Tensor = result_leaves(result)[0]
    return output


def _output_axis(runs: Sequence[Runs]) -> BatchAxis | None:
    """Return the place of the examples in the first output, along its leading axis."""
    return _axis([(x.examples, _first_output(x.result), _first_output(x.moved_result)) for x in runs], range(1))


def _independence(run: Run, seen: Seen) -> tuple[bool | None, tuple[str, ...]]:
    """Return whether an output depends on one example alone; if not, the leaf through which others come in, if one."""
    examples, first, axes = seen.examples, seen.runs[0], seen.examples.axes
    moves = _output_axis(seen.runs)
    place = moves or BatchAxis()
    if _first_output(first.result).shape[:1] != (first.examples * place.outer * place.inner,):
        return None, ()

    def apart(replaced: Sequence[str]) -> bool | None:
        for other in (first.examples, *range(1, first.examples)):  # one may make no difference by chance
            try:
                result, _ = run(examples.some(first.examples, replaced=replaced, other=other))
            except Exception:
                return None
            differs = _differ(place, first.examples, first.result, result)
            if differs.any():
                return not differs[1:].any()
        return None

    alone = apart(tuple(axes))
    if alone is False and len(axes) > 1:
        for path in axes:
            if apart([other for other in axes if other != path]):
                return False, (path,)
    return (alone if moves is not None or alone is False else None), ()


def _differ(place: BatchAxis, n: int, result: Any, other: Any) -> Tensor:
    """Return for each example whether its outputs differ, those along the leading axis."""
    lengths = {_first_output(result).shape[0]}
    differ = torch.zeros(n, dtype=torch.bool, device=_first_output(result).device)
    for x, y in zip(result_leaves(result), result_leaves(other), strict=True):
        if not isinstance(x, Tensor) or not x.ndim or x.shape[0] not in lengths or x.shape != y.shape or not x.numel():
            continue
        rounding = _rounding(x)
        x, y = (place.in_front(_comparable(z), n) for z in (x, y))
        differ |= ((x - y).abs() > rounding * x.abs().amax()).reshape(n, -1).any(dim=1)
    return differ


def _placement(name: str, number: int, use: Use, runs: Sequence[Runs]) -> tuple[Placement | None, bool]:
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
        axis = _axis(pairs, candidates) or _constant_axis(pairs, candidates)
        mapped = axis is not None and axis.shared and use.mapped  # no probe can be longer than an axis of vmap
        if mapped or (axis is None and _constant(pairs) and len({first.shape for _, first, _ in pairs}) == 1):
            return None, True
        axes.append(axis)
    if any(axis is None for axis in axes):
        return None, False
    return (axes[0], axes[-1]), False  # type: ignore[return-value]


def _axis(pairs: Sequence[tuple[int, Tensor, Tensor]], candidates: Sequence[int]) -> BatchAxis | None:
    """Return the one place of the examples that explains how tensors moved, of each number of examples."""
    places: set[BatchAxis] | None = None
    for n, first, moved in pairs:
        if first.shape != moved.shape:
            return None
        here = {place for axis in candidates if axis < first.ndim for place in _moved_along(axis, n, first, moved)}
        places = here if places is None else places & here
    return places.pop() if places and len(places) == 1 else None


def _moved_along(axis: int, n: int, first: Tensor, moved: Tensor) -> Iterator[BatchAxis]:
    length = first.shape[axis]
    if not first.numel() or length % n:
        return
    x, y = (_comparable(z).movedim(axis, 0).reshape(length, -1) for z in (first, moved))
    for outer in range(1, length // n + 1):
        if (length // n) % outer:
            continue
        inner = length // n // outer
        before, after = (z.reshape(outer, n, inner, -1) for z in (x, y))
        expected = before.roll(-1, 1)
        spread = (before - expected).abs().amax()
        if bool(spread > _rounding(first) * x.abs().amax()) and bool((after - expected).abs().amax() <= 1e-3 * spread):
            yield BatchAxis(axis, outer, inner)


def _constant(pairs: Sequence[tuple[int, Tensor, Tensor]]) -> bool:
    """Return whether the tensors do not depend on the examples."""
    return all(x.shape == y.shape and torch.equal(_comparable(x), _comparable(y)) for _, x, y in pairs)


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


def _comparable(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64).nan_to_num()
