"""Averages of many blocks on many processes, round by round: the calls between processes do not grow with depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import optree
from torch import Tensor

from lrkfac.core.base.processes import Processes
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.stacking import Work, solved_together, stacks_of, together


class Exchange(Protocol):
    """How questions and answers travel; blocks and what belongs to them by number."""

    def own(self, block: Block) -> bool:
        """Return whether this process has the state of a block."""
        ...

    def to_all(self, questions: Mapping[int, Any], blocks: Mapping[int, Block], round: int) -> dict[int, Any]:
        """Return the questions of all blocks."""
        ...

    def summed(self, answers: Mapping[int, Any], blocks: Mapping[int, Block]) -> dict[int, Any]:
        """Return the sums of answers to this process' blocks."""
        ...


@dataclass(frozen=True, eq=False)
class Undivided:
    """All processes have all states."""

    processes: Processes

    def own(self, block: Block) -> bool:
        """Return that it has."""
        return True

    def to_all(self, questions: Mapping[int, Any], blocks: Mapping[int, Block], round: int) -> dict[int, Any]:
        """Return the questions: they are everywhere."""
        return dict(questions)

    def summed(self, answers: Mapping[int, Any], blocks: Mapping[int, Block]) -> dict[int, Any]:
        """Return the sums of all answers, in one call."""
        leaves, structure = optree.tree_flatten(list(answers.values()))
        trees: list[Any] = optree.tree_unflatten(structure, self.processes.sum(leaves) if leaves else leaves)
        return dict(zip(answers, trees, strict=True))


def averages_in_rounds(
    step: Any,
    blocks: Sequence[Block],
    averages: Mapping[str, Any],
    uses: Sequence[Any],
    dampings: Mapping[str, float | Tensor],
    exchange: Exchange,
) -> dict[str, Any]:
    """Return the averages after a batch of which every process has a part, by name.

    Args:
        step: The parts of an update, see ``refresh``.
        blocks: All blocks that have statistics.
        averages: Of this process' blocks, by name.
        uses: The statistics of each block.
        dampings: Of each block, by name.
        exchange: Between processes.
    """
    numbered = dict(enumerate(blocks))
    carries = {i: averages[block.name] for i, block in numbered.items() if exchange.own(block)}

    def of_each(work: Work, operands: Mapping[int, tuple[Any, ...]], sized_by: int = 0) -> dict[int, Any]:
        results = together(work, [blocks[i] for i in operands], dampings, list(operands.values()), sized_by)
        return dict(zip(operands, results, strict=True))

    alone = {i: block for i, block in numbered.items() if not block.structure.rounds}
    whole = exchange.to_all({i: carries[i] for i in alone if i in carries}, alone, 0) if alone else {}
    for i, average in whole.items():  # one by one: no sum may depend on what is stacked, by the sizes of this process
        new = of_each(step.update, {i: (average, uses[i])})
        carries.update({i: new[i]} if i in carries else {})
    in_rounds = {i: block for i, block in numbered.items() if i not in alone}
    carries.update(of_each(step.begin, {i: (carries[i],) for i in in_rounds if i in carries}))
    for round in range(max([block.structure.rounds for block in in_rounds.values()], default=0)):
        now = {i: block for i, block in in_rounds.items() if round < block.structure.rounds}
        own = {i: block.structure.question(carries[i], round) for i, block in now.items() if i in carries}
        questions = exchange.to_all(own, now, round)
        answers = of_each(partial(step.measure, round), {i: (questions[i], uses[i]) for i in now}, sized_by=1)
        sums = exchange.summed(answers, now)
        taking = {i: (carries[i], x) for i, x in sums.items() if blocks[i].structure.takes_eigenpairs(round)}
        solved = _eigenpairs(partial(step.eigenproblem, round), blocks, taking, dampings)
        ready = {i: (carries[i], one, solved.get(i, ())) for i, one in sums.items()}
        carries.update(of_each(partial(step.advance, round), ready))
    return {blocks[i].name: carry for i, carry in carries.items()}


def _eigenpairs(
    work: Work, blocks: Sequence[Block], operands: Mapping[int, tuple[Any, ...]], dampings: Mapping[str, float | Tensor]
) -> dict[int, Any]:
    """Return the eigenpairs of the matrices that a function makes of some blocks, by number.

    In the order of one process, since the rounding of an eigenvector depends on where its matrix lies in memory. It
    decides where all eigenvalues are equal, as without gradients.
    """
    numbers = list(operands)
    stacks = stacks_of([blocks[i] for i in numbers], dampings, list(operands.values()))
    problems = [stack.call(work, *stack.joined(list(operands.values()))) for stack in stacks]
    pairs = solved_together([stack.blocks for stack in stacks], problems)
    return {numbers[i]: one for stack, x in zip(stacks, pairs, strict=True) for i, one in stack.apart(x).items()}
