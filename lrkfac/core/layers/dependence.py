"""Where the examples are in what a model reads and computes: seen from what moves when they change places.

A few examples are run twice, the second time in other places. What holds one entry for each example moves with them,
whatever its axis and whatever else shares the axis; lengths alone decide nothing. Further runs with one example
replaced show whether others depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.containers import result_leaves
from lrkfac.core.base.private_torch import is_fake, is_transformed
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.generic import Examples
from lrkfac.core.layers.independence import does_not_depend, independence, takes_copies
from lrkfac.core.layers.movement import Run, Runs, Seen, axis_of, output_axis, placement, single_outputs
from lrkfac.core.layers.placement import Placement
from lrkfac.core.layers.uses import Use

SIZES = (4, 6)
"""Numbers of examples; both even, for models that pair them."""


@dataclass(frozen=True)
class Batch:
    """The examples of a model.

    Attributes:
        axes: The axis of the batch of each leaf of the inputs that has one, by path; ``None`` if unknown.
        independent: Whether the outputs of each example depend on no other; ``None`` if unknown.
        single: Whether outputs have one entry for each example along their leading axis.
        places: Of each use, by label: its placement, ``None`` if its rows are not known by example, and whether it has
            one value for all examples and no axis for them.
        own: Whether heads have different numbers of examples, each its own.
    """

    axes: Mapping[str, int] | None
    independent: bool | None
    single: bool
    places: Mapping[str, Sequence[tuple[Placement | None, bool]]]
    own: bool = False

    def unknown(self) -> int:
        """Return the number of uses whose rows are not known by example."""
        return sum(place is None for group in self.places.values() for place, _ in group)

    def rank(self) -> tuple[int, bool, bool]:
        """Return what makes one description better than another."""
        return -self.unknown(), self.independent is True, self.single


UNKNOWN = Batch(None, None, False, {})


def find_batches(
    run: Run,
    inputs: Tree,
    uses: Mapping[str, Sequence[Use]],
    axes: Mapping[str, int] | None,
    constant: Sequence[str],
    lengths: Sequence[int],
) -> Batch:
    """Find the examples of a model, also where heads have different numbers of examples, each its own.

    Args are those of ``find_batch``, and:
        lengths: Of the leading axis of each tensor that the model returns.
    """
    batch = find_batch(run, inputs, uses, axes, constant)
    if axes is not None or len(set(lengths)) == 1:
        return batch
    groups, found = [], []
    for length in dict.fromkeys(lengths):
        of_group = _of_heads(run, [i for i, n in enumerate(lengths) if n == length])
        one = find_batch(of_group, inputs, uses, None, constant, moving=True)
        if one.axes:
            groups.append(of_group)
            found.append(one)
    every = [path for one in found for path in one.axes or ()]
    if len(found) < 2 or len(set(every)) < len(every):
        return batch
    pairs = [(of_head, one) for of_head, own in zip(groups, found, strict=True) for one in found if one is not own]
    apart = all(does_not_depend(of_head, inputs, other.axes or {}) for of_head, other in pairs)
    known = [one.independent for one in found]
    return Batch(
        {path: axis for one in found for path, axis in (one.axes or {}).items()},
        None if None in known else apart and all(known),
        all(one.single for one in found),
        {name: [_only([one.places[name][i] for one in found]) for i in range(len(of))] for name, of in uses.items()},
        own=True,
    )


def _of_heads(run: Run, chosen: Sequence[int]) -> Run:
    """Return a run of which some outputs are the result."""

    def run_some(some: Tree, probes: Mapping[tuple[str, int], Tensor] = MappingProxyType({})) -> Any:
        result, uses = run(some, probes)
        leaves = result_leaves(result)
        return [leaves[i] for i in chosen], uses

    return run_some


def _only(places: Sequence[tuple[Placement | None, bool]]) -> tuple[Placement | None, bool]:
    """Return the place of the examples by which alone a use moves, if they stand along an axis of their own."""
    known = [place for place, _ in places if place is not None]
    alone = len(known) == 1 and all(x.outer == x.inner == 1 and not x.shared for x in known[0])
    return ((known[0][0]._replace(own=True), known[0][1]._replace(own=True)) if alone else None), False


def find_batch(
    run: Run,
    inputs: Tree,
    uses: Mapping[str, Sequence[Use]],
    axes: Mapping[str, int] | None = None,
    constant: Sequence[str] = (),
    moving: bool = False,
) -> Batch:
    """Find the examples of a model.

    Args:
        run: Runs the model with parameters in general position.
        inputs: Of a batch of any size, with values.
        uses: The uses of its weights, as a run without values saw them.
        axes: The axes of the batch by the path of a leaf of the inputs, where the user gives them.
        constant: Paths of leaves that hold no examples.
        moving: Whether examples must move with the first output.

    Returns:
        What the runs show; unknown where the model cannot take other batches.
    """
    leaves = dict(zip(paths(inputs), optree.tree_leaves(inputs), strict=True))
    tensors = {path: x for path, x in leaves.items() if isinstance(x, Tensor) and x.ndim and path not in constant}
    if any(is_transformed(x) or is_fake(x) for x in tensors.values()):
        return UNKNOWN
    best = UNKNOWN
    for hypothesis in [axes] if axes is not None else _hypotheses(tensors):
        batch = _batch(run, inputs, hypothesis, uses, axes is None, moving)
        if batch is not None and (best is UNKNOWN or batch.rank() > best.rank()):
            best = batch
        if best.independent and not best.unknown():
            break
    return best


def _batch(
    run: Run,
    inputs: Tree,
    axes: Mapping[str, int],
    uses: Mapping[str, Sequence[Use]],
    may_drop: bool,
    moving: bool,
) -> Batch | None:
    """Return the examples along some axes; ``None`` if nothing moves with them."""
    seen = _seen(run, inputs, axes, uses)
    if seen is None or (moving and output_axis(seen.runs) is None):
        return None
    independent, through = independence(run, seen)
    batch = _described(run, seen, independent, uses)
    if not may_drop or not through:
        return batch
    # A leaf through which examples depend on each other may hold none, unless layers say otherwise.
    fewer = _seen(run, inputs, {path: axis for path, axis in axes.items() if path not in through}, uses)
    if fewer is None:
        return batch
    without = _described(run, fewer, True, uses)
    return without if without.unknown() <= batch.unknown() else batch


def _described(run: Run, seen: Seen, independent: bool | None, uses: Mapping[str, Sequence[Use]]) -> Batch:
    pairs = {name: [placement(name, i, use, seen.runs) for i, use in enumerate(group)] for name, group in uses.items()}
    for name, group in pairs.items():
        for i, (place, _) in enumerate(group):
            if place is not None and place[1].shared and not takes_copies(run, seen, (name, i)):
                group[i] = (None, True)
    return Batch(seen.examples.axes, independent, single_outputs(seen.runs), pairs)


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
            if runs is not None and output_axis(runs) is not None:
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
        if axis_of(pairs, range(1)) is not None:
            return True
    return False
