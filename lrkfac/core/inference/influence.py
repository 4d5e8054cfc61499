"""Influence functions: how training examples act on the losses of others, by rows of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_number
from lrkfac.core.base.dtypes import floating, floating_dtype
from lrkfac.core.curvature.block_trees import members, over_stack, stacked_axes
from lrkfac.core.curvature.examples import has_rows_of_numbers, rows_by_example
from lrkfac.core.curvature.layer_blocks import LayerBlocks
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.inference.rows import check_rows, example_columns
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.kinds import EMBEDDING
from lrkfac.core.layers.statistics import Statistics

LARGEST = 2**24
"""Numbers of gradients of examples that are formed at once, in layers whose rows are not at hand."""


def influence(
    curvature: LayerBlocks,
    queries: Evaluation | Statistics,
    examples: Evaluation | Statistics | Iterable[Evaluation | Statistics],
    damping: float | Tensor,
    exact: bool = True,
) -> Tensor:
    """Return the influence ``g_qᵀ (F + λ I)⁻¹ g_n`` of training examples ``n`` on the losses of queries ``q``.

    A step of a share ``ε`` along the natural gradient of one example's loss lowers that of a query by ``ε`` times this
    number (Koh & Liang 2017, arXiv 1703.04730; Grosse et al. 2023, arXiv 2308.03296). Leaving example ``n`` out of a
    mean over ``N`` raises the loss of the query by about ``1 / N`` times it: positive for helpful examples.

    No gradient of a training example is formed in linear layers: with ``H_q`` the preconditioned gradient of a query, a
    layer adds ``Σ_t g_tᵀ H_q a_t``, from inputs ``a_t`` and output gradients ``g_t`` at the positions of the example.
    Gradients of queries are formed, one layer after the other. Other kinds form gradients of a few examples at a time.

    Args:
        curvature: From ``estimate`` or ``from_state``; ``curvature.of_layers(names)`` for only some layers.
        queries: Evaluation of the queries, or its statistics, by an evaluator with ``estimator="empirical"``: gradients
            at true targets. Few at a time.
        examples: The same of the training examples; or an iterable of such, for a data set batch by batch.
        damping: ``λ > 0``.
        exact: Whether Kronecker products are damped exactly; see ``lrkfac.linalg.inverse``.

    Returns:
        ``[queries, examples]``, in the dtype of the curvature.

    Raises:
        ValueError: If ``damping`` is not positive and finite, or statistics are missing, lack a layer, or have more
            than one row of gradients for each example, as those of other estimators have.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> likelihood = lrkfac.categorical()
        >>> exact, at_targets = (lrkfac.evaluator(model, likelihood, layers, e) for e in ("exact", "empirical"))
        >>> fisher = lrkfac.curvature.estimate(exact, params, [(x, y)], layers, rank=2)
        >>> queries, examples = at_targets(params, x[:2], y[:2]), at_targets(params, x, y)
        >>> lrkfac.curvature.influence(fisher, queries, examples, damping=0.1).shape
        torch.Size([2, 8])
    """
    if not isinstance(curvature, LayerBlocks):
        raise TypeError(f"curvature: expected what from_state() or estimate() returned, got {type(curvature).__name__}")
    check_number(damping, "damping", 0, includes_low=False)
    check_flag(exact, "exact")
    blocks, layers = curvature.blocks, curvature.layers
    of_queries = _statistics(queries, "queries", curvature)
    parts = [examples] if isinstance(examples, Evaluation | Statistics) else examples
    if isinstance(parts, str | dict | Tensor) or not isinstance(parts, Iterable):
        raise TypeError(
            f"examples: expected an Evaluation, Statistics or an iterable of them, got {type(parts).__name__}"
        )
    inverse = curvature.inverse(damping, exact)
    preconditioned: dict[str, Tensor] = {}
    for name, operator in inverse.blocks.items():
        axes = stacked_axes(name, members(layers, name), operator)
        columns = example_columns(name, operator, layers, of_queries)
        preconditioned[name] = over_stack(lambda one, x: one.matvec(x), axes)(operator, columns)
    found = []
    for part in parts:
        statistics = _statistics(part, "examples", curvature)
        each = [_of_block(name, blocks[name], layers, h, statistics) for name, h in preconditioned.items()]
        found.append(torch.stack(each).sum(dim=0))
    if not found:
        raise ValueError("examples: expected at least one batch, got none")
    return torch.cat(found, dim=1)


def _of_block(name: str, operator: Any, layers: Layers, preconditioned: Tensor, statistics: Statistics) -> Tensor:
    """Return the part of one block, ``[q, n]``, from preconditioned gradients of queries ``[*, d, q]``."""
    layer, dtype = members(layers, name)[0], floating_dtype(operator)
    flat = preconditioned.flatten(0, -2)
    if name and layer.groups == 1 and set(layer.kinds) == {EMBEDDING.name}:
        return torch.stack([_along_embedding(layer, h.reshape(layer.d_out, -1), statistics) for h in flat.mT])
    if name and layer.groups == 1 and has_rows_of_numbers(layer):
        rows = rows_by_example(layer, statistics.inputs[layer.name], statistics.output_gradients[layer.name])
        a, g = (x.to(dtype) for x in (rows[0], rows[1][0]))
        return torch.stack([((g @ h.reshape(layer.d_out, -1)) * a).sum(dim=(-2, -1)) for h in flat.mT])
    count, step = statistics.inputs[layer.name][0].shape[0], max(1, LARGEST // flat.shape[0])
    parts = [slice(start, start + step) for start in range(0, count, step)]
    columns = [example_columns(name, operator, layers, statistics, part).flatten(0, -2) for part in parts]
    return torch.cat([flat.mT @ floating(one, dtype) for one in columns], dim=1)


def _along_embedding(layer: Layer, h: Tensor, statistics: Statistics) -> Tensor:
    """Return the products of one matrix ``[d_out, d_in]`` with the gradients of all examples, by the rows picked."""
    total = []
    for a, g, (_, padding) in zip(
        statistics.inputs[layer.name], statistics.output_gradients[layer.name], layer.options, strict=True
    ):
        products = (h[a] * floating(g[0], h.dtype)).sum(dim=-1)
        if padding is not None:
            products = torch.where(a == padding, 0, products)
        total.append(products.flatten(1).sum(dim=1) if products.ndim > 1 else products)
    return torch.stack(total).sum(dim=0)


def _statistics(given: Any, name: str, curvature: LayerBlocks) -> Statistics:
    """Return statistics with one gradient for each example; raise if they are something else."""
    if not isinstance(given, Evaluation | Statistics):
        raise TypeError(f"{name}: expected an Evaluation or Statistics, got {type(given).__name__}")
    statistics = given.statistics if isinstance(given, Evaluation) else given
    if statistics is None:
        raise ValueError(f"{name}: expected an evaluation with statistics, got one without")
    check_rows(curvature.blocks, curvature.layers, statistics, name)
    for block in curvature.blocks:
        for layer in members(curvature.layers, block):
            count = statistics.output_gradients[layer.name][0].shape[0]
            if count != 1:
                raise ValueError(
                    f"{name}: expected one gradient for each example, got {count}; make them by "
                    'evaluator(..., estimator="empirical") of a likelihood all of whose heads have the same examples'
                )
    return statistics
