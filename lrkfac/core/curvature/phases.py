"""Refreshes of many blocks on one process, in phases between which the eigenproblems of all are solved together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.protocol import BlockStructure
from lrkfac.core.curvature.stacking import Stack, solved_together, stacks_of


class Paused(NamedTuple):
    """Where a refresh waits for eigenpairs: carry and answers of the round, and the matrices, then their eigenpairs."""

    carry: Any
    answers: Any
    problem: Any


def takes_eigenpairs(structure: BlockStructure) -> list[bool]:
    """Return for each round of a structure whether it takes eigenpairs."""
    return [structure.takes_eigenpairs(round) for round in range(structure.rounds)]


def refreshed_in_phases(
    step: Any,
    blocks: Sequence[Block],
    dampings: Mapping[str, float | Tensor],
    averages: Sequence[Any],
    uses: Sequence[Any],
) -> list[Any]:
    """Return the state of each block after a batch.

    Each phase leads all stacks to their next eigenproblems, which are then solved in one call for each size. Statistics
    are stacked for the time of one stack alone.

    Args:
        step: The parts of an update, see ``refresh``.
        blocks: Blocks that have statistics.
        dampings: Of each block, by name.
        averages: Of each block.
        uses: The statistics of each block.

    Raises:
        StackError: If a matrix cannot be decomposed.
    """
    stacks = stacks_of(blocks, dampings, list(zip(averages, uses, strict=True)), sized_by=1)
    states: dict[int, Any] = {}
    waiting = [(stack, 0, stack.joined(averages)) for stack in stacks]
    while waiting:
        paused: list[tuple[Stack, int, Paused]] = []
        for stack, start, given in waiting:
            takes = takes_eigenpairs(stack.blocks[0].structure)
            first = start + isinstance(given, Paused)
            asks = first < len(takes) or not takes
            reached = stack.call(partial(step.phase, start), given, stack.joined(uses) if asks else ())
            if isinstance(reached, Paused):
                paused.append((stack, takes.index(True, first), reached))
            else:
                states.update(stack.apart(reached))
        solved = solved_together([stack.blocks for stack, _, _ in paused], [one.problem for _, _, one in paused])
        waiting = [
            (stack, start, one._replace(problem=pairs))
            for (stack, start, one), pairs in zip(paused, solved, strict=True)
        ]
    return [states[i] for i in range(len(blocks))]
