"""Evaluations of a joint batch of which each process of a group has a part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import optree
import torch
from torch import Tensor

from lrkfac.core.base.collectives import CollectiveError
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.private_torch import is_transformed
from lrkfac.core.base.processes import Processes
from lrkfac.core.base.replicas import check_same, fingerprints
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.agreement import (
    Agreement,
    check_device,
    check_facts,
    check_marks,
    failure,
    is_debugging,
    mark,
)
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.joined import buffer_dtype, joined, take_part
from lrkfac.core.likelihoods.joint import Joint, Leaves

Run = Callable[["Turn"], Evaluation]
"""Evaluates this process' part."""


@dataclass(frozen=True)
class Parts:
    """The processes of an evaluator, each of which evaluates a part of every batch.

    Attributes:
        processes: All of them.
        heads: The number of heads.
        scattered: Indices of the gradients that stay parts.
        agreement: What they have found to agree upon.
    """

    processes: Processes
    heads: int
    scattered: frozenset[int] = frozenset()
    agreement: Agreement = field(default_factory=Agreement, compare=False, repr=False)

    def evaluate(self, run: Run, params: Tree, facts: str, counts: int) -> Evaluation:
        """Return the evaluation of the joint batch.

        Args:
            run: Evaluates this process' part.
            params: Where.
            facts: What all processes must have in common, in words.
            counts: How often ``run`` asks for the totals of several heads.

        Raises:
            ValueError: On all processes, if one of them fails, or as ``joined``; on the first evaluation, if parameters
                differ.
        """
        given = [x for x in optree.tree_leaves(params) if isinstance(x, Tensor)]
        leaves = self.agreement.leaves or given or [torch.zeros(())]  # also of parameters that are to be refused
        like = leaves[0].new_zeros((), dtype=buffer_dtype(leaves))
        turn = Turn(self.processes, facts, like, self.heads, counts if self.heads > 1 else 0)
        if torch.compiler.is_compiling() or any(is_transformed(x) for x in given):
            return joined(run(turn), self.processes, facts, self.agreement.lengths or {}, self.scattered)
        checks = self.agreement.lengths is None or is_debugging()
        try:
            if checks:
                check_device(self.processes, like.device, self.processes.backends)
            part = run(turn)
            self._check_lengths(part.grads)
        except Exception as error:
            if not isinstance(error, CollectiveError):
                self._stop(turn, leaves, failure(error), checks)
                error.add_note(f"rank {self.processes.rank} failed; all {self.processes.size} ranks stop with an error")
            raise
        if checks:
            self._agree(facts, params, part.grads)
        return joined(part, self.processes, facts, self.agreement.lengths or {}, self.scattered)

    def _agree(self, facts: str, params: Tree, grads: Tree) -> None:
        """Compare facts and parameters, and settle which gradients are gathered by rows."""
        rows = {i: len(x.left) for i, x in enumerate(optree.tree_leaves(grads)) if isinstance(x, LazyMatrix)}
        every = self.processes.exchange((facts, fingerprints(params), rows))
        check_facts([one for one, _, _ in every])
        check_same("params", [one for _, one, _ in every])
        if self.agreement.lengths is None:
            self.agreement.leaves = [x.new_zeros(()).expand(x.shape) for x in optree.tree_leaves(params)]
            lazy = {i: max(of[i] for _, _, of in every) for i in rows if all(i in of for _, _, of in every)}
            shapes = [x.shape for x in optree.tree_leaves(params)]
            size = 2 * self.processes.size
            self.agreement.lengths = {
                i: n for i, n in lazy.items() if size * n * sum(shapes[i]) <= shapes[i][0] * shapes[i][1]
            }

    def _check_lengths(self, grads: Tree) -> None:
        leaves = optree.tree_leaves(grads)
        for i, length in (self.agreement.lengths or {}).items():
            rows = len(leaves[i].left) if isinstance(leaves[i], LazyMatrix) else None
            if rows is None or rows > length:
                raise ValueError(
                    f"inputs: expected a batch no larger than the largest part of the first one, {length} rows of the "
                    f"gradient of shape {tuple(leaves[i].shape)}, got {'more' if rows is None else rows}; with "
                    "thin=True processes gather as many rows each; start with the largest batch, or use thin=False"
                )

    def _stop(self, turn: Turn, leaves: list[Tensor], facts: str, checks: bool) -> None:
        """Tell the other processes that this one has failed, in the calls in which they wait for it."""
        while turn.counts:
            with suppress(ValueError):  # the error of this process tells more
                turn.skip(facts)
        with suppress(ValueError):
            if checks:
                self.processes.exchange((facts, {}, {}))
            else:
                take_part(leaves, self.processes, facts, self.agreement.lengths or {}, self.scattered)


class Turn:
    """One evaluation of this process' part, which asks the others how much counts.

    Args:
        processes: All processes.
        facts: What they must have in common.
        like: A zero in the dtype of sums, ``[]``.
        heads: The number of heads.
        counts: How often totals of several heads are to come.
    """

    def __init__(self, processes: Processes, facts: str, like: Tensor, heads: int, counts: int) -> None:
        self.processes, self.facts, self.like, self.heads, self.counts = processes, facts, like, heads, counts

    def counted(self, heads: Joint, outputs: Leaves, targets: Leaves) -> Joint:
        """Return the heads with totals: those of this part for one head, by those of the joint batch for several.

        With several, the loss of this part, times its share of the examples, then adds up to that of the joint batch,
        whatever shares of each head's targets are ignored where.
        """
        weights = heads.head_weights(outputs, targets)
        if len(weights) > 1:
            number = weights[0].new_full((), outputs[0].shape[0])
            *totals, all_examples = self._sum(torch.stack([*weights, number]), self.facts)
            share = number / all_examples.clamp(min=1)
            weights = tuple([(share * total).to(weights[0].dtype) for total in totals])
        return replace(heads, totals=tuple([x.clamp(min=torch.finfo(x.dtype).tiny) for x in weights]))

    def skip(self, facts: str) -> None:
        """Take part in the next sum with nothing but a mark."""
        self._sum(self.like.expand(self.heads + 1), facts)

    def _sum(self, numbers: Tensor, facts: str) -> Tensor:
        self.counts -= 1
        total, marks = self.processes.sum([numbers.to(self.like.dtype), mark(facts, self.processes, self.like)])
        check_marks(marks, self.processes, facts)
        return total
