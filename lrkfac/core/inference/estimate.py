"""The curvature of a data set: the plain mean over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_dtype, check_function, check_integer
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.assignment import Chosen, blocks
from lrkfac.core.curvature.blocks import dtype_of, initial_average
from lrkfac.core.curvature.layer_blocks import LayerBlocks
from lrkfac.core.curvature.ranks import AutoRank, resolved
from lrkfac.core.curvature.refresh import averages
from lrkfac.core.evaluation.data_curvature import check_batches, check_pair
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.inference.from_state import operator_of
from lrkfac.core.layers.description import Layers, check_layers

MANY = 2**40
"""Steps after which a bias-corrected average keeps its decay itself; a power of 2³², so that seeds stay the same."""


def estimate(
    evaluate: Callable[..., Evaluation],
    params: Tree,
    batches: Iterable[tuple[Tree, Tree]],
    layers: Layers,
    structure: Chosen = None,
    *,
    rank: AutoRank | None = None,
    passes: int = 1,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] | None = None,
) -> LayerBlocks:
    """Return the mean curvature of a data set at one point in parameter space, as an operator on trees.

    It is the plain mean over all terms, where a transformation has a moving average: batches count by
    ``Evaluation.weight``. Dense, diagonal and exact blocks are those of the whole data set in one batch, to rounding.
    Low-rank ones are tracked from batch to batch, and more accurate after further passes, or with
    ``iterations`` in their structure.

    Args:
        evaluate: From ``evaluator``, best with ``estimator="exact"``.
        params: Where to evaluate.
        batches: Pairs of inputs and targets, such as a ``DataLoader``; ``tqdm(loader)`` shows progress.
        layers: From ``find_layers``.
        structure: How to represent each layer's block, as for ``precondition_by_fisher``.
        rank: Of the default structure, as there.
        passes: How often to go through the batches, each time from the bases that the last one found. For more than
            one, ``batches`` must be a container, not an iterator.
        dtype: Of the operator, float32 or float64; as for ``precondition_by_fisher``.
        progress: Called with 1 after each batch, such as ``tqdm(total=n).update``.

    Returns:
        An operator in the unit of the square of the gradient, one block for each layer.

    Raises:
        ValueError: If there is no batch, or an iterator is to be passed twice; if a batch is one of several processes,
            or has no statistics; as ``precondition_by_fisher`` for structures.
        TypeError: If an argument has the wrong type, or a batch is no pair.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator="exact")
        >>> batches = list(zip(x.split(4), y.split(4)))
        >>> fisher = lrkfac.curvature.estimate(evaluate, params, batches, layers, lrkfac.structures.full())
        >>> fisher.to_dense().shape
        torch.Size([8, 8])
    """
    check_function(evaluate, "evaluate")
    check_layers(layers)
    check_integer(passes, "passes")
    if dtype is not None:
        check_dtype(dtype)
    if progress is not None:
        check_function(progress, "progress")
    check_batches(batches, passes)
    leaves = check_like(layers.tree, params, "params")
    assigned = blocks(layers, structure, resolved(layers, structure, rank))
    if not assigned:
        raise ValueError("layers: expected at least one layer, got none; print(layers) says why")
    mean = {block.name: initial_average(block, leaves, dtype or dtype_of(block, leaves)) for block in assigned}
    for _ in range(passes):
        total: Tensor | None = None
        for evaluation in _evaluations(evaluate, params, batches):
            weight, statistics = evaluation.weight, evaluation.statistics
            assert statistics is not None
            kept = torch.zeros_like(weight) if total is None else total / (total + weight)
            total = weight if total is None else total + weight
            statistics = optree.tree_map(Tensor.detach, statistics)
            mean = {
                name: _counted(one, -MANY)
                for name, one in averages(
                    assigned, {name: _counted(one, MANY) for name, one in mean.items()}, statistics, kept
                ).items()
            }
            if progress is not None:
                progress(1)
        if total is None:
            raise ValueError("batches: expected at least one batch, got none")
    return operator_of(mean, layers)


def _evaluations(
    evaluate: Callable[..., Evaluation], params: Tree, batches: Iterable[tuple[Tree, Tree]]
) -> Iterator[Evaluation]:
    for i, batch in enumerate(batches):
        check_pair(batch, i)
        evaluation = evaluate(params, *batch)
        if not isinstance(evaluation, Evaluation):
            raise TypeError(
                f"evaluate: expected a function made by evaluator(), got one of {type(evaluation).__name__}"
            )
        if evaluation.statistics is None:
            raise ValueError("evaluate: expected evaluations with statistics, got one without")
        if evaluation.among is not None:
            raise ValueError(
                "evaluate: expected evaluations of one process, got those of several; make evaluator() without group="
            )
        yield evaluation


def _counted(average: Any, more: int) -> Any:
    """Return an average with more steps: of very many, the weight that it keeps is the decay itself."""
    return optree.tree_map(lambda x: x if x.is_floating_point() else x + more, average)
