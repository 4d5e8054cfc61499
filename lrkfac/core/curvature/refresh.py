"""Refresh: new averages and their damped inverses, from the statistics of a batch.

Blocks of equal layers are refreshed in one call, so that the number of operations does not grow with depth; on several
processes all blocks are, round by round, so that the number of sums over processes does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import floating, floating_dtype
from lrkfac.core.base.eager import has_values
from lrkfac.core.base.processes import Among, Processes
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import BlockState, damped_inverse
from lrkfac.core.curvature.examples import JointStatistics, LayerStatistics
from lrkfac.core.curvature.phases import Paused, refreshed_in_phases, takes_eigenpairs
from lrkfac.core.curvature.rounds import Exchange, Undivided, averages_in_rounds
from lrkfac.core.curvature.stacking import StackError, together
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.layers.statistics import Statistics, Uses


def refresh(
    blocks: Sequence[Block],
    states: Mapping[str, BlockState],
    statistics: Statistics,
    dampings: Mapping[str, float | Tensor],
    decay: float | Tensor,
    among: Among | None = None,
    division: Exchange | None = None,
) -> dict[str, Any]:
    """Return the state of each block after a batch; the last one, itself, where there are no statistics of a block.

    A scale or shift with the default structure also keeps its last state where there are no output gradients:
    normalised inputs have the second moment 1, so that with ``B = I`` its block would be the identity.

    Args:
        blocks: All blocks.
        states: Their states, by name.
        statistics: Of a batch. They are reduced in the dtype of the averages.
        dampings: ``λ`` for each block, by name.
        decay: Decay of the running averages.
        among: The place of this process among others, each with a part of the batch: averages are then those of all,
            bit for bit the same everywhere. Structures ask in rounds: what all blocks ask in one is one sum.
        division: Owners of the blocks among these processes, or ``None`` where all have all states. Where another
            process owns a block, its state here is empty.

    Raises:
        ValueError: If statistics of a layer are missing, have no gradients where the structure needs them, or have no
            finite inverse; names the layer.
    """
    due = due_blocks(blocks, statistics)
    own = [block for block in due if division is None or division.own(block)]
    step = _Step(statistics.scale, decay, among)
    averages = {block.name: states[block.name].average for block in own}
    seen = statistics if among is None else _occupied(statistics)
    uses = [_uses(block, seen) for block in due]
    try:
        if among is None:
            new = refreshed_in_phases(step, due, dampings, list(averages.values()), uses)
        else:
            exchange = division or Undivided(among.processes)
            averages = averages_in_rounds(step, due, averages, uses, dampings, exchange)
            new = together(step.inverse, own, dampings, [(averages[block.name],) for block in own])
    except StackError as error:
        raise ValueError(
            f"layer {_culprit(error.blocks, statistics)!r}: no inverse of its factors: its statistics, or damping or "
            f"decay where they are tensors, are not finite or out of range ({error.__cause__})"
        ) from error
    refreshed = {block.name: state for block, state in zip(own, new, strict=True)}
    return {block.name: refreshed.get(block.name, states[block.name]) for block in blocks}


def averages(
    blocks: Sequence[Block], last: Mapping[str, Any], statistics: Statistics, decay: float | Tensor
) -> dict[str, Any]:
    """Return the average of each block after a batch, without an inverse; raises as ``refresh``."""
    due = due_blocks(blocks, statistics)
    operands = [(last[block.name], _uses(block, statistics)) for block in due]
    try:
        new = together(_Step(statistics.scale, decay).update, due, {block.name: 1.0 for block in due}, operands)
    except StackError as error:
        raise ValueError(
            f"layer {_culprit(error.blocks, statistics)!r}: its statistics are not finite ({error.__cause__})"
        ) from error
    return {**last, **{block.name: average for block, average in zip(due, new, strict=True)}}


BlockUses = tuple[tuple[Uses, Uses], ...]
"""Inputs and output gradients of each layer of a block, with groups in front."""


@dataclass(frozen=True, eq=False)
class _Step:
    """The parts of a refresh, as functions of one group of a block, or of several stacked blocks.

    Attributes:
        scale: Of the statistics.
        decay: Of the running averages.
        among: The place of this process among others, or ``None``.
    """

    scale: Tensor
    decay: float | Tensor
    among: Among | None = None

    def phase(
        self, start: int, block: Block, damping: float | Tensor, given: Any, uses: BlockUses, stacked: bool = False
    ) -> BlockState | Paused:
        """Return the state after a batch, or what there is before the first round from ``start`` on to take eigenpairs.

        ``given`` is the average, or what there was before that round, with its eigenproblems solved.
        """
        structure = block.structure
        if not any(takes_eigenpairs(structure)):
            return self.inverse(block, damping, self.update(block, damping, given, uses, stacked))
        if isinstance(given, Paused):
            carry = structure.advance(given.carry, given.answers, start, given.problem)  # type: ignore[call-arg]
            start += 1
        else:
            carry = structure.begin(given, self.decay)
        if start < structure.rounds:
            statistics = self._statistics(block, uses, floating_dtype(carry), stacked, None)
        for round in range(start, structure.rounds):
            answers = structure.measure(structure.question(carry, round), statistics, round)
            if structure.takes_eigenpairs(round):
                return Paused(carry, answers, structure.eigenproblem(carry, answers, round))
            carry = structure.advance(carry, answers, round)
        return self.inverse(block, damping, carry)

    def update(
        self, block: Block, damping: float | Tensor, average: Any, uses: BlockUses, stacked: bool = False
    ) -> Any:
        """Return the average after a batch; what is asked of statistics is summed over processes."""
        processes = None if self.among is None else self.among.processes
        statistics = self._statistics(block, uses, floating_dtype(average), stacked, processes)
        return block.structure.update_from(average, statistics, self.decay)

    def begin(self, block: Block, damping: float | Tensor, average: Any, stacked: bool = False) -> Any:
        """Return what the first round starts from."""
        return block.structure.begin(average, self.decay)

    def measure(
        self, round: int, block: Block, damping: float | Tensor, question: Any, uses: BlockUses, stacked: bool = False
    ) -> Any:
        """Return the answer of the statistics of this process in a round."""
        statistics = self._statistics(block, uses, floating_dtype(question), stacked, None)
        return block.structure.measure(question, statistics, round)

    def eigenproblem(
        self, round: int, block: Block, damping: float | Tensor, carry: Any, answers: Any, stacked: bool = False
    ) -> Any:
        """Return the matrices whose eigenpairs ``advance`` takes in a round."""
        return block.structure.eigenproblem(carry, answers, round)

    def advance(
        self,
        round: int,
        block: Block,
        damping: float | Tensor,
        carry: Any,
        answers: Any,
        solved: Any = (),
        stacked: bool = False,
    ) -> Any:
        """Return what the next round starts from, after the last one the average."""
        return block.structure.advance(carry, answers, round, *([solved] if solved else []))

    def inverse(self, block: Block, damping: float | Tensor, average: Any, stacked: bool = False) -> BlockState:
        """Return the state of a new average."""
        return BlockState(average, *damped_inverse(block.structure, average, damping))

    def _statistics(
        self, block: Block, uses: BlockUses, dtype: torch.dtype, stacked: bool, processes: Processes | None
    ) -> LayerStatistics | JointStatistics:
        """Return statistics in the dtype of the averages."""
        scale, each = self.scale.to(dtype), []
        for layer, (inputs, gradients) in zip(block.layers, uses, strict=True):
            each.append(
                (layer, tuple([floating(a, dtype) for a in inputs]), tuple([floating(g, dtype) for g in gradients]))
            )
        if block.structure.joins_layers:
            return JointStatistics(tuple(each), scale)
        if self.among is None:
            return LayerStatistics(*each[0], scale, stacked)
        share, first = self.among.share.to(dtype), self.among.processes.rank == 0
        return LayerStatistics(*each[0], scale, stacked, share, first, processes)


def _uses(block: Block, statistics: Statistics) -> BlockUses:
    """Return inputs and output gradients of each of the block's layers."""
    inputs, gradients = statistics.inputs, statistics.output_gradients
    return tuple(
        [(split_groups(one, inputs[one.name]), split_groups(one, gradients[one.name])) for one in block.layers]
    )


def _occupied(statistics: Statistics) -> Statistics:
    """Return statistics with one example of zeros where there is none, which has no share of the batch."""
    inputs, gradients = statistics.inputs, statistics.output_gradients
    return statistics._replace(
        inputs={name: tuple([_padded(a, 0) for a in uses]) for name, uses in inputs.items()},
        output_gradients={name: tuple([_padded(g, 1) for g in uses]) for name, uses in gradients.items()},
    )


def _padded(x: Tensor, axis: int) -> Tensor:
    return x if x.shape[axis] else x.new_zeros(*x.shape[:axis], 1, *x.shape[axis + 1 :])


def due_blocks(blocks: Sequence[Block], statistics: Statistics) -> list[Block]:
    """Return the blocks of which there are statistics; raises as ``refresh``."""
    return [block for block in blocks if _is_due(block, statistics)]


def _is_due(block: Block, statistics: Statistics) -> bool:
    """Return whether there are statistics to refresh the block from.

    Raises:
        ValueError: If they are those of other layers, or lack what the structure needs.
    """
    for layer in block.layers:
        if layer.name not in statistics.inputs:
            raise ValueError(
                f"evaluation: no statistics of layer {layer.name!r}; make evaluator() and the transformation from the "
                "same layers"
            )
    missing = [layer.name for layer in block.layers if not statistics.inputs[layer.name]]
    if len(missing) == len(block.layers):
        return False
    if missing:
        raise ValueError(f"statistics: full() holds all layers together and cannot do without those of {missing}")
    name = block.layers[0].name
    if block.structure.needs_gradients and not statistics.output_gradients[name]:
        if block.implied:
            return False
        raise ValueError(
            f"structure: layer {name!r} is held by {block.structure.form} block, which needs the "
            'gradients at the layer\'s outputs: the estimator "forward_only" takes none; use kronecker(...), '
            "uncorrected, or another estimator"
        )
    return True


def _culprit(stack: list[Block], statistics: Statistics) -> str:
    """Return the name of the first layer whose statistics are not finite, else that of the first of all."""
    layers = [layer for block in stack for layer in block.layers]
    for layer in layers:
        tensors = [*statistics.inputs[layer.name], *statistics.output_gradients[layer.name]]
        if any(has_values(x) and not bool(x.isfinite().all()) for x in tensors):
            return layer.name
    return layers[0].name
