"""The evaluation of a joint batch, of which each process has a part.

A process is a micro-batch that lies elsewhere: means are weighted as in ``merge_evaluations``. Rows of statistics stay
where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.leaves import tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.processes import Among, Processes
from lrkfac.core.base.rows import padded
from lrkfac.core.base.summand import Summand
from lrkfac.core.base.trees import materialize, weighted
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.agreement import check_counts, check_marks, mark
from lrkfac.core.evaluation.evaluation import Evaluation

Lengths = Mapping[int, int]
"""Of gradients whose rows are gathered, by the leaf's index: the number of rows of each process, after padding."""


def joined(
    part: Evaluation,
    processes: Processes,
    facts: str,
    lengths: Lengths,
    scattered: frozenset[int] = frozenset(),
) -> Evaluation:
    """Return the evaluation of the joint batch from that of this process' part.

    One flat sum over processes: of weights, loss, gradients, scale and size of the statistics, and a mark of
    what each process did; and one call that gathers the rows of lazy gradients where ``lengths`` has any.

    Args:
        part: Of this process.
        processes: Of the joint batch.
        facts: What all processes must have in common, in words.
        lengths: Of gradients whose rows are gathered; all others are formed.
        scattered: Indices of the gradients that stay parts; the others are summed.

    Raises:
        ValueError: On all processes, where values are known, if their facts differ or nothing counts.
    """
    weight, statistics = part.weight, part.statistics
    leaves, structure = tree_flatten(part.grads)
    formed = {i: materialize(leaf) for i, leaf in enumerate(leaves) if i not in lengths and i not in scattered}
    like = weight.to(buffer_dtype(part.grads))
    size = torch.zeros_like(like) if statistics is None or part.size is None else part.size.to(like)
    inverse_scale = size if statistics is None else torch.where(size > 0, (1 / statistics.scale).to(like), 0)
    numbers = [like, inverse_scale, size, mark(facts, processes, like)]
    sums = [like * x.to(like.dtype) for x in (part.loss, *formed.values())]
    total, total_inverse, total_size, marks, loss, *sums = processes.sum([*numbers, *sums])
    check_marks(marks, processes, facts)
    check_counts(total, processes)
    share = like / total
    means: dict[int, Any] = {i: (x / total).to(formed[i].dtype) for i, x in zip(formed, sums, strict=True)}
    means |= gathered({i: leaves[i] for i in lengths}, lengths, processes, share)
    means |= {
        i: Summand(share * materialize(leaves[i]).to(like.dtype), leaves[i].dtype, processes)
        for i in scattered
        if i not in lengths
    }
    products = JointProducts(_functions(part), processes, share)
    if statistics is not None:
        statistics = statistics._replace(scale=(1 / total_inverse).to(statistics.scale.dtype))
    return part._replace(
        loss=(loss / total).to(part.loss.dtype),
        grads=tree_unflatten(structure, [means[i] for i in range(len(leaves))]),
        statistics=statistics,
        product=partial(JointProducts.product, products),
        quadratic=partial(JointProducts.quadratic, products),
        gram=partial(JointProducts.gram, products),
        loss_at=partial(JointProducts.loss_at, products),
        weight=total.to(weight.dtype),
        among=Among(processes, size, total_size),
    )


def take_part(
    params: Tree, processes: Processes, facts: str, lengths: Lengths, scattered: frozenset[int] = frozenset()
) -> None:
    """Take part in the sum of ``joined`` with nothing but a mark, so that no other process waits for this one.

    Raises:
        ValueError: If facts differ, as those of a process that failed do.
    """
    leaves = tree_leaves(params)
    like = leaves[0].new_zeros((), dtype=buffer_dtype(params))
    zeros = [
        torch.zeros_like(leaf, dtype=like.dtype)
        for i, leaf in enumerate(leaves)
        if i not in lengths and i not in scattered
    ]
    marks = processes.sum([like, like, like, mark(facts, processes, like), like, *zeros])[3]
    check_marks(marks, processes, facts)


def buffer_dtype(tree: Tree) -> torch.dtype:
    """Return the dtype in which numbers are summed: the widest of all leaves, at least float32."""
    return widest(torch.float32, *[leaf.dtype for leaf in tree_leaves(tree)])


def gathered(
    rows: Mapping[int, LazyMatrix], lengths: Lengths, processes: Processes, share: Tensor
) -> dict[int, LazyMatrix]:
    """Return lazy matrices with the rows of all processes, each process' times its share, by one call."""
    if not rows:
        return {}
    scaled = {i: matrix.scaled(share) for i, matrix in rows.items()}
    sides = [padded(x, lengths[i]) for i, matrix in scaled.items() for x in (matrix.left, matrix.right)]
    dtype = widest(*[side.dtype for side in sides])
    flat = torch.cat([side.reshape(-1).to(dtype) for side in sides])[None]
    parts = processes.gather(flat, 1).split([side.numel() for side in sides], dim=1)
    whole = [x.reshape(-1, side.shape[1]).to(side.dtype) for x, side in zip(parts, sides, strict=True)]
    pairs = zip(whole[::2], whole[1::2], strict=True)
    return {i: LazyMatrix(left, right, rows[i].dtype) for i, (left, right) in zip(rows, pairs, strict=True)}


def _functions(part: Evaluation) -> Evaluation:
    return part._replace(grads=None, outputs=None, aux=None, statistics=None)


@dataclass(frozen=True, eq=False, repr=False)
class JointProducts:
    """The functions of a joint evaluation: sums over processes, each with its share.

    Attributes:
        part: The evaluation of this process' part, of which only functions are used.
        processes: All processes, which must call the same function.
        share: The share of this process in the weight of all terms, ``[]``.
    """

    part: Evaluation
    processes: Processes
    share: Tensor

    def product(self, tangent: Tree) -> Tree:
        """Return ``F tangent``."""
        return self._sum(self.part.product(tangent))

    def quadratic(self, u: Tree, v: Tree) -> Tensor:
        """Return ``uᵀ F v``, ``[]``."""
        total: Tensor = self._sum(self.part.quadratic(u, v))
        return total

    def gram(self, tangents: Tree, *others: Tree) -> Tensor:
        """Return ``uᵢᵀ F uⱼ``, ``[k, k]``."""
        total: Tensor = self._sum(self.part.gram(tangents, *others))
        return total

    def loss_at(self, params: Tree) -> Tensor:
        """Return the loss at other parameters, ``[]``."""
        total: Tensor = self._sum(self.part.loss_at(params))
        return total

    def _sum(self, tree: Any) -> Any:
        leaves, structure = tree_flatten(tree)
        sums = self.processes.sum([weighted(self.share, x) for x in leaves])
        return tree_unflatten(structure, [x.to(leaf.dtype) for x, leaf in zip(sums, leaves, strict=True)])
