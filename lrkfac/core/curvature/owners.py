"""Layers divided among processes: each has one owner, which alone has its state and preconditions its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.exchange import Form, from_owners, to_owners
from lrkfac.core.base.processes import Among, Processes
from lrkfac.core.base.summand import Summand
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import initial_average
from lrkfac.core.curvature.costs import statistics_of_rows


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor in a question, which is a leaf of the tree, and its dtype.

    Attributes:
        numbers: Of entries along each axis.
        dtype: ``None`` for that of the block's averages.
    """

    numbers: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Owners:
    """Which process owns which block; the same on all processes.

    Attributes:
        processes: All of them.
        ranks: By the name of a block, the rank of its owner.
        parameters: By the index of a parameter that a block covers, the rank of its owner.
        questions: By the name of a block, its question in each round, with a ``Shape`` for each tensor.
    """

    processes: Processes
    ranks: dict[str, int]
    parameters: dict[int, int]
    questions: dict[str, list[Any]]

    def own(self, block: Block) -> bool:
        """Return whether this process owns a block."""
        return self.ranks[block.name] == self.processes.rank

    def own_part(self, by_name: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of this process' blocks."""
        return {name: x for name, x in by_name.items() if self.ranks[name] == self.processes.rank}

    def facts(self) -> dict[str, str]:
        """Return what must be the same on all processes, in words."""
        return {f"owner of {name}": f"rank {rank}" for name, rank in self.ranks.items()}

    def collected(self, gradients: Tree) -> Tree:
        """Return gradients of which each is whole where its owner is; elsewhere it is this process' part."""
        leaves, structure = optree.tree_flatten(gradients)
        parts = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Summand) and i in self.parameters]
        sums = to_owners([leaves[i].part for i in parts], [self.parameters[i] for i in parts], self.processes)
        for place, i in enumerate(parts):
            leaves[i] = sums.get(place, leaves[i].part).to(leaves[i].dtype)
        return optree.tree_unflatten(structure, leaves)

    def gathered(self, natural: Mapping[int, Any], gradients: Sequence[Any], blank: Tensor) -> dict[int, Tensor]:
        """Return the natural gradients of all covered parameters, by index, from those of this process' parameters.

        Args:
            natural: Of the blocks of this process.
            gradients: Of all parameters; natural gradients have their shapes and dtypes.
            blank: See ``from_owners``.
        """
        indices = list(self.parameters)
        forms = [Form(tuple(gradients[i].shape), gradients[i].dtype) for i in indices]
        own = {place: materialize(natural[i]) for place, i in enumerate(indices) if i in natural}
        tensors = from_owners(own, forms, [self.parameters[i] for i in indices], self.processes, blank)
        return dict(zip(indices, tensors, strict=True))


@dataclass(frozen=True, eq=False)
class Division:
    """The owners within one refresh.

    Attributes:
        owners: Of all blocks.
        dtypes: Of the averages of each block, by name.
        blank: See ``from_owners``: mapped over where carries are.
    """

    owners: Owners
    dtypes: Mapping[str, torch.dtype]
    blank: Tensor

    def own(self, block: Block) -> bool:
        """Return whether this process has the state of a block."""
        return self.owners.own(block)

    def numbers(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a number ``[]`` of each block from those of this process' blocks, in the dtype of the averages."""
        names = list(self.owners.ranks)
        forms = [Form((), self.dtypes[name]) for name in names]
        given = {place: own[name] for place, name in enumerate(names) if name in own}
        owners = list(self.owners.ranks.values())
        numbers = from_owners(given, forms, owners, self.owners.processes, self.blank)
        return dict(zip(names, numbers, strict=True))

    def to_all(self, questions: Mapping[int, Any], blocks: Mapping[int, Block], round: int) -> dict[int, Any]:
        """Return the questions of all blocks from those of this process' blocks."""
        forms: list[Form] = []
        owners: list[int] = []
        own: dict[int, Tensor] = {}
        trees: dict[int, tuple[Any, int]] = {}
        for i, block in blocks.items():
            shapes, structure = optree.tree_flatten(self.owners.questions[block.name][round])
            trees[i] = structure, len(shapes)
            if i in questions:
                own.update(dict(enumerate(optree.tree_leaves(questions[i]), len(forms))))
            forms += [Form(one.numbers, one.dtype or self.dtypes[block.name]) for one in shapes]
            owners += [self.owners.ranks[block.name]] * len(shapes)
        leaves = iter(from_owners(own, forms, owners, self.owners.processes, self.blank))
        return {i: optree.tree_unflatten(tree, list(islice(leaves, n))) for i, (tree, n) in trees.items()}

    def summed(self, answers: Mapping[int, Any], blocks: Mapping[int, Block]) -> dict[int, Any]:
        """Return the sums over processes of the answers to this process' blocks."""
        leaves: list[Tensor] = []
        owners: list[int] = []
        trees: dict[int, Any] = {}
        places: dict[int, range] = {}
        for i, tree in answers.items():
            of_tree, trees[i] = optree.tree_flatten(tree)
            places[i] = range(len(leaves), len(leaves) + len(of_tree))
            leaves += of_tree
            owners += [self.owners.ranks[blocks[i].name]] * len(of_tree)
        sums = to_owners(leaves, owners, self.owners.processes)
        mine = [i for i in answers if self.own(blocks[i])]
        return {i: optree.tree_unflatten(trees[i], [sums[place] for place in places[i]]) for i in mine}


def owners_of(blocks: Sequence[Block], processes: Processes) -> Owners:
    """Return the owners: the largest first, each goes to the process that has least so far.

    Blocks that share a parameter have one owner.
    """
    ranks: dict[str, int] = {}
    loads = [0] * processes.size
    for together in sorted(_sharing(blocks), key=lambda some: -sum(cost(block) for block in some)):
        rank = loads.index(min(loads))
        loads[rank] += sum(cost(block) for block in together)
        ranks.update({block.name: rank for block in together})
    parameters = {index: ranks[block.name] for block in blocks for index in _indices(block)}
    return Owners(processes, {block.name: ranks[block.name] for block in blocks}, parameters, _questions(blocks))


def check_division(owners: Owners, among: Among | None, states: Any) -> None:
    """Raise unless a batch is shared by the processes of the owners, and states are those of this process.

    Raises:
        ValueError: Says which group the evaluation must have, or names the layer whose state is another's.
    """
    processes = owners.processes
    if among is None or among.processes != processes:
        got = "one process" if among is None else f"{among.processes.size} processes"
        raise ValueError(
            f"evaluation: expected that of a batch shared by the {processes.size} processes of owners=, got one of "
            f"{got}; give evaluator(..., group=) that group"
        )
    if not isinstance(states, dict) or set(states) != set(owners.ranks):
        names = sorted(states) if isinstance(states, dict) else type(states).__name__
        raise ValueError(f"state: expected entries of the layers {sorted(owners.ranks)}, got {names}; {_REMEDY}")
    for name, rank in owners.ranks.items():
        if (rank == processes.rank) == (states[name] == ()):
            raise ValueError(
                f"state: rank {rank} of {processes.size} owns layer {name!r} and alone has its averages, but rank "
                f"{processes.rank} has {'none' if states[name] == () else 'some'}; {_REMEDY}"
            )


_REMEDY = "pass what init() or the last update() of this transformation returned on this process"


def cost(block: Block) -> int:
    """Return what a block costs in each step, about half the operations that apply its inverse.

    In a product each number of ``B`` meets each column of the gradient, each number of ``A`` each row.
    """
    average = _average(block)
    if not average.is_product:
        return _numbers(average)
    output, input = average.factor_states()
    layer = block.layers[0]
    return _numbers(output) * layer.d_in + _numbers(input) * layer.d_out


def _numbers(tree: Any) -> int:
    return sum(x.numel() for x in optree.tree_leaves(tree))


def _average(block: Block) -> Any:
    leaves = {layer.weight.index: torch.empty((), device="meta") for layer in block.layers}
    return initial_average(block, leaves, torch.float32)


def _indices(block: Block) -> list[int]:
    places = [place for layer in block.layers for place in (layer.weight, layer.bias) if place is not None]
    return list(dict.fromkeys(place.index for place in places))


def _sharing(blocks: Sequence[Block]) -> list[list[Block]]:
    """Return groups of blocks that have a parameter in common, in the order of their first."""
    groups: list[tuple[set[int], list[Block]]] = []
    for block in blocks:
        indices, members = set(_indices(block)), [block]
        for group in [group for group in groups if group[0] & indices]:
            groups.remove(group)
            indices, members = group[0] | indices, group[1] + members
        groups.append((indices, members))
    return [members for _, members in groups]


def _questions(blocks: Sequence[Block]) -> dict[str, list[Any]]:
    """Return each block's questions, by a refresh without numbers.

    A structure without rounds asks once, for all of its average.
    """
    return {block.name: [_shapes(block, question) for question in _asked(block)] for block in blocks}


def _asked(block: Block) -> list[Any]:
    """Return the questions of one group of a block, on the device "meta"."""
    structure, (one, statistics) = block.structure, statistics_of_rows(block, torch.float32)
    average = _average(one)
    if not structure.rounds:
        return [average]
    carry, asked = structure.begin(average, 0.9), []
    for round in range(structure.rounds):
        asked.append(structure.question(carry, round))
        carry = structure.advance(carry, structure.measure(asked[-1], statistics, round), round)
    return asked


def _shapes(block: Block, question: Any) -> Any:
    groups = block.layers[0].groups if len(block.layers) == 1 else 1
    in_front = () if groups == 1 else (groups,)
    return optree.tree_map(lambda x: Shape((*in_front, *x.shape), None if x.is_floating_point() else x.dtype), question)
