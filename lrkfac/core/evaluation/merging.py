"""Evaluations of micro-batches as one of their union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.processes import Among, processes_of
from lrkfac.core.base.tree_checks import check_like, difference
from lrkfac.core.base.trees import materialize, weighted
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.joined import joined
from lrkfac.core.layers.statistics import Statistics


def merge_evaluations(evaluations: Sequence[Evaluation], group: Any = None) -> Evaluation:
    """Return the evaluation of a batch from those of its micro-batches, all at the same parameters.

    Loss, gradients and Fisher products are means over the micro-batches, weighted with ``Evaluation.weight``: the means
    over all terms. Rows of the statistics are concatenated. So one update with the result equals that of one batch to
    rounding, for every structure and estimator. Activations live for one micro-batch at a time; statistics and inputs
    live for all of them.

    Outputs are concatenated along the batch, ``aux`` is the tuple of the micro-batches'. Micro-batches may differ in
    the number of examples (where the batch is the leading axis in every layer), not in any other length.

    Equality needs a loss that is a mean over the examples (batch normalisation in training mode mixes those of one
    micro-batch). With several heads, the heads' weights of terms must have the same proportions in each micro-batch.

    Args:
        evaluations: At least one; either all with statistics or all without.
        group: The processes that have parts of the batch, see ``evaluator``. Evaluations made without a group are then
            merged over processes as well, by one sum for all of them. They drew their targets as one process does, so
            that processes need different seeds, or ``noise=``; with equal seeds all draw the same numbers.

    Returns:
        The evaluation of the union; all its gradients are tensors.

    Raises:
        ValueError: If there is none, trees, layers or lengths differ, some were made with a group and some without, or
            all were and there is another ``group``.
        TypeError: If one is no ``Evaluation``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> inputs, targets = torch.randn(8, 3), torch.randint(2, (8,))
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), lrkfac.find_layers(model, params, inputs))
        >>> batches = zip(inputs.split(4), targets.split(4))
        >>> merged = lrkfac.merge_evaluations([evaluate(params, x, y) for x, y in batches])
        >>> torch.allclose(merged.loss, evaluate(params, inputs, targets).loss)
        True
    """
    if isinstance(evaluations, Evaluation) or not isinstance(evaluations, Sequence):
        raise TypeError(f"evaluations: expected a sequence of Evaluations, got {type(evaluations).__name__}")
    evaluations = tuple(evaluations)
    if not evaluations:
        raise ValueError("evaluations: expected at least one, got none")
    for i, part in enumerate(evaluations):
        if not isinstance(part, Evaluation):
            raise TypeError(f"evaluations[{i}]: expected an Evaluation, got {type(part).__name__}")
        check_like(evaluations[0].grads, part.grads, f"evaluations[{i}].grads")
    among = _among(evaluations)
    if group is not None and among is not None:
        raise ValueError(
            "group: expected none, since the evaluations were made with a group and are those of joint batches; give "
            "it to evaluator() for a sum in each evaluation, or to merge_evaluations() for one in all"
        )
    merged = _merged(evaluations, among)
    if group is None:
        return merged
    facts = "no statistics" if merged.statistics is None else f"statistics of {sorted(merged.statistics.inputs)}"
    return joined(merged, processes_of(group), facts, {})


def _merged(evaluations: tuple[Evaluation, ...], among: Among | None) -> Evaluation:
    weights = torch.stack([part.weight for part in evaluations])
    shares = (weights / weights.sum()).unbind()
    aux = tuple(part.aux for part in evaluations)
    # Without the trees, which merged functions do not need and would keep in memory.
    functions = [part._replace(grads=None, outputs=None, aux=None, statistics=None) for part in evaluations]
    grads = mean(shares, [materialize(part.grads) for part in evaluations])
    products = MergedProducts(tuple(functions), shares, grads)
    sizes: list[Any] = [part.size for part in evaluations]
    return Evaluation(
        loss=mean(shares, [part.loss for part in evaluations]),
        grads=grads,
        outputs=concatenated([part.outputs for part in evaluations], 0, "outputs"),
        aux=None if all(part is None for part in aux) else aux,
        statistics=merged_statistics([part.statistics for part in evaluations], shares),
        product=partial(MergedProducts.product, products),
        quadratic=partial(MergedProducts.quadratic, products),
        gram=partial(MergedProducts.gram, products),
        loss_at=partial(MergedProducts.loss_at, products),
        weight=weights.sum(),
        among=among,
        size=None if None in sizes else torch.stack(sizes).sum(),
    )


def _among(evaluations: tuple[Evaluation, ...]) -> Among | None:
    """Return the place of this process for the union.

    Raises:
        ValueError: If evaluations differ in their group.
    """
    places = [part.among for part in evaluations]
    groups = {None if place is None else place.processes for place in places}
    if len(groups) > 1:
        raise ValueError(f"evaluations: expected all with the same group or all without, got {groups}")
    if places[0] is None:
        return None
    counts = [torch.stack(numbers).sum() for numbers in zip(*[place[1:] for place in places if place], strict=True)]
    return Among(places[0].processes, *counts)


@dataclass(frozen=True, eq=False, repr=False)
class MergedProducts:
    """The functions of a merged evaluation: weighted means of those of its parts.

    Attributes:
        parts: The evaluations of the micro-batches, of which only functions are used.
        shares: The weight of each, ``[]``; they add up to 1.
        grads: The gradients of the merged evaluation, by which ``merged_from`` tells them from others.
    """

    parts: tuple[Evaluation, ...]
    shares: tuple[Tensor, ...]
    grads: Tree = None

    def product(self, tangent: Tree) -> Tree:
        """Return ``F tangent``."""
        return mean(self.shares, [part.product(tangent) for part in self.parts])

    def quadratic(self, u: Tree, v: Tree) -> Tensor:
        """Return ``uᵀ F v``, ``[]``."""
        return mean(self.shares, [part.quadratic(u, v) for part in self.parts])

    def gram(self, tangents: Tree, *others: Tree) -> Tensor:
        """Return ``uᵢᵀ F uⱼ``, ``[k, k]``."""
        return mean(self.shares, [part.gram(tangents, *others) for part in self.parts])

    def loss_at(self, params: Tree) -> Tensor:
        """Return the loss at other parameters, ``[]``."""
        return mean(self.shares, [part.loss_at(params) for part in self.parts])


def merged_from(evaluation: Evaluation) -> tuple[tuple[Evaluation, ...], Tree]:
    """Return the evaluations that were merged into one, without their trees, and the gradients it got then.

    Of an evaluation that was not merged, these are itself and ``None``.
    """
    products = next(iter(getattr(evaluation.product, "args", ())), None)
    if not isinstance(products, MergedProducts):
        return (evaluation,), None
    return tuple([one for part in products.parts for one in merged_from(part)[0]]), products.grads


def mean(shares: Sequence[Tensor], trees: Sequence[Tree]) -> Any:
    """Return the sum of trees, each times its share, in the dtypes of the first."""

    def leaf_mean(*parts: Tensor) -> Tensor:
        terms = [weighted(share, x) for share, x in zip(shares, parts, strict=True)]
        return torch.stack(terms).sum(dim=0).to(parts[0].dtype)

    return optree.tree_map(leaf_mean, *trees)


def merged_statistics(parts: Sequence[Statistics | None], shares: Sequence[Tensor]) -> Statistics | None:
    """Return the statistics of all parts as one; ``None`` where none has any.

    Raises:
        ValueError: If some have none, or layers or lengths differ.
    """
    statistics = [part for part in parts if part is not None]
    if not statistics:
        return None
    if len(statistics) < len(parts):
        raise ValueError("evaluations: expected statistics of all or of none, got some without")
    for i, part in enumerate(statistics):
        differs = difference(statistics[0][:2], part[:2])
        if differs is not None:
            raise ValueError(f"evaluations[{i}]: expected statistics of the same layers as the first, got {differs}")
    counted = [
        optree.tree_map(lambda x, share=share: torch.where(share > 0, x, 0), (part.output_gradients, part.residuals))
        for part, share in zip(statistics, shares, strict=True)
    ]
    gradients, residuals = (list(each) for each in zip(*counted, strict=True))
    return Statistics(
        concatenated([part.inputs for part in statistics], 0, "statistics: inputs"),
        concatenated(gradients, 1, "statistics: output gradients"),
        1 / torch.stack([1 / part.scale for part in statistics]).sum(),
        concatenated(residuals, 1, "statistics: residuals") if all(residuals) else (),
    )


def concatenated(trees: Sequence[Tree], axis: int, what: str) -> Any:
    """Concatenate trees leaf by leaf along the axis of the examples; ``what`` names them in errors.

    Raises:
        ValueError: If leaves differ in the length of another axis.
    """

    def leaf_concatenated(*parts: Tensor) -> Tensor:
        others = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in parts}
        if len(others) > 1:
            raise ValueError(
                f"evaluations: {what} have the shapes {[tuple(x.shape) for x in parts]}, which differ in more than the "
                "number of examples; make micro-batches that are equal in all else, by padding where need be"
            )
        return torch.cat(parts, dim=axis)

    return optree.tree_map(leaf_concatenated, *trees)
