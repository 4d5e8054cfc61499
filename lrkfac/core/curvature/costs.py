"""Costs of a preconditioner before any step: bytes of its state and operations of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_dtype
from lrkfac.core.base.private_torch import intercept, operation_counts
from lrkfac.core.base.text import short, table
from lrkfac.core.curvature.assignment import RANK, Block, Chosen, blocks, ranks_of
from lrkfac.core.curvature.blocks import BlockState, damped_inverse
from lrkfac.core.curvature.examples import LayerStatistics
from lrkfac.core.curvature.precondition import apply
from lrkfac.core.curvature.ranks import (
    COUNTER,
    AutoRank,
    bytes_of,
    cost_key,
    dtype_at_start,
    free,
    ranks_within,
    resolved,
    state_at_start,
)
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.layers.kinds import LINEAR, LinearOptions
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.layers.placement import IN_FRONT

ROWS = 1_000_003
"""Number of rows in counts: no other length, so that it marks the operations of each row."""


class Cost(NamedTuple):
    """The cost of a layer, or of all; operations are multiplications and additions, one each.

    Attributes:
        structure: The block's structure, in words.
        bytes: Of the tensors of its state, after ``init`` and at all times.
        apply: Operations that precondition its gradient as a matrix, in each step.
        refresh: Operations of a batch of statistics, whatever its size: bases, eigenpairs, inverses.
        refresh_per_row: Operations that each row adds: an example, or a position of it, of a sample of the estimator.
    """

    structure: str
    bytes: int
    apply: int
    refresh: int
    refresh_per_row: int


class Explanation(NamedTuple):
    """The result of ``explain``; ``print`` shows it as a table.

    Attributes:
        layers: The cost of each layer by name, of all together under ``""`` where one block holds them.
        ranks: The rank of each layer that takes the default structure, for ``rank=``.
        total: The cost of all blocks.
    """

    layers: dict[str, Cost]
    ranks: dict[str, int]
    total: Cost

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "structure", "bytes", "apply [op]", "refresh [op]", "per row [op]")]
        for name, cost in [*self.layers.items(), ("all", self.total)]:
            operations = (cost.apply, cost.refresh, cost.refresh_per_row)
            rows.append((name or "(all layers)", cost.structure, f"{cost.bytes:,}", *[short(x) for x in operations]))
        return table(rows, right=True)


def explain(
    layers: Layers,
    structure: Chosen = None,
    *,
    rank: AutoRank | None = None,
    budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Return bytes and operations of ``precondition_by_fisher(layers, structure, rank=rank)``, per layer and in all.

    Bytes are those of all tensors in its state, exactly; some share memory in a plain chain, none in
    ``adaptive_low_rank_kfac``. Operations are counted along the code itself, on tensors without numbers: matrix
    products by ``torch.utils.flop_counter``, QR as 4 m n² - 4/3 n³, symmetric eigenproblems as 9 n³, Cholesky and its
    inverse as n³ (Golub & Van Loan). Left out are operations on single entries, and the gradients of single examples
    that exact blocks need. A convolution counts as the product with its rows that it is; with a dense factor it takes
    twice as much per row.

    Args:
        layers: From ``find_layers``.
        structure: As for ``precondition_by_fisher``.
        rank: Of its default structure; see there.
        budget: Bytes. Chooses that rank: the largest for which the whole state takes at most so many bytes, common to
            all layers, and one more for as many of them as then fit. ``rank=`` takes ``explain(...).ranks``.
        dtype: Of the factors; by default, as for ``precondition_by_fisher``, float64 if a layer's parameters were when
            the layers were found, else float32.

    Returns:
        The costs as an ``Explanation``: ``layers``, ``ranks`` and ``total``.

    Raises:
        ValueError: If both ``rank`` and ``budget`` are given, not even rank 1 fits, or as ``precondition_by_fisher``.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> layers = lrkfac.find_layers(lambda p, x: x @ p, torch.ones(20, 30), torch.ones(4, 20))
        >>> explanation = lrkfac.explain(layers, rank=2)
        >>> explanation.total.bytes
        1188
        >>> print(next(iter(explanation.layers.values())).structure)
        A rank 2, B rank 2 + diagonal
    """
    check_layers(layers)
    if dtype is not None:
        check_dtype(dtype)
    if budget is not None and rank is not None:
        raise ValueError(f"budget: expected rank or budget, got both, rank={rank!r}; leave one of them out")
    chosen = resolved(layers, structure, rank) if budget is None else ranks_within(layers, structure, budget, dtype)
    assigned = blocks(layers, structure, chosen)
    costs: dict[str, Cost] = {}
    known: dict[Any, Cost] = {}
    for block in assigned:
        block_dtype = dtype or dtype_at_start(block)
        key = cost_key(block), block_dtype
        if key not in known:
            known[key] = _cost(block, block_dtype)
        costs[block.name] = known[key]
    free_names = free(assigned)
    ranks = {name: r for name, r in ranks_of(layers, RANK if chosen is None else chosen).items() if name in free_names}
    totals = (sum(getattr(cost, name) for cost in costs.values()) for name in Cost._fields[1:])
    total = Cost("", *totals)
    return Explanation(costs, ranks, total._replace(bytes=total.bytes + COUNTER * len(assigned)))


def _cost(block: Block, dtype: torch.dtype) -> Cost:
    one = _one_group(block)
    start = state_at_start(one, dtype)
    groups = block.layers[0].groups if len(block.layers) == 1 else 1
    gradients = []
    for layer in one.layers:
        shape = (layer.groups * layer.d_out, layer.d_in)
        gradients.append(LayerMatrix.of(torch.empty(shape, dtype=dtype, device="meta"), layer.bias is not None))
    refreshed, per_row = _operations(partial(_refreshed, one, start, ROWS, dtype))
    applied, _ = _operations(partial(apply, one, [start.inverse], gradients))
    size = bytes_of(state_at_start(block, dtype))
    return Cost(block.structure.description(), size, groups * applied, groups * refreshed, groups * per_row)


def _one_group(block: Block) -> Block:
    """Return the block of one group of a layer, as a product with rows."""
    if len(block.layers) > 1:
        return block
    (layer,) = block.layers
    plain = replace(
        layer,
        kinds=(LINEAR.name,),
        options=(tuple(LinearOptions()),),
        groups=1,
        placements=(IN_FRONT,),
        carried=False,
    )
    return block._replace(layers=(plain,))


@dataclass(frozen=True)
class _Rows(LayerStatistics):
    """Statistics that have the gradients of single examples already: these come from the evaluation's operations."""

    gradients_of_examples: Tensor | None = None

    def example_gradients(self) -> Tensor:
        assert self.gradients_of_examples is not None
        return self.gradients_of_examples


def statistics_of_rows(block: Block, dtype: torch.dtype, rows: int = 2) -> tuple[Block, LayerStatistics]:
    """Return the block of one group of a layer, as a product with rows, and statistics of them without numbers."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    one = _one_group(block)
    layer = one.layers[0]
    whole = sum(x.groups * x.d_out * x.d_in for x in one.layers)
    each = empty(rows, whole, 1) if one.structure.joins_layers else empty(rows, layer.d_out, layer.d_in)
    a, g = empty(rows, layer.d_in - (layer.bias is not None)), empty(1, rows, layer.d_out)
    return one, _Rows(layer, (a,), (g,), empty(), gradients_of_examples=each)


def _refreshed(block: Block, state: BlockState, rows: int, dtype: torch.dtype) -> Any:
    """Return the inverse after a refresh with a number of rows, of numbers that do not matter."""
    one, statistics = statistics_of_rows(block, dtype, rows)
    return damped_inverse(one.structure, one.structure.update_from(state.average, statistics, 0.9), 1.0)


def _operations(of: Callable[[], Any]) -> tuple[int, int]:
    """Return multiplications and additions of matrix products and decompositions: without rows, and for each row."""
    formulas = {**operation_counts(), **_formulas()}
    counted = [0, 0]

    def count(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = operation(*args, **kwargs)
        if operation.overloadpacket in formulas:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
            number = formulas[operation.overloadpacket](*args, **kwargs, out_val=result)
            of_rows = any(ROWS in shape for shape in shapes if isinstance(shape, tuple))
            counted[of_rows] += number
        return result

    with intercept(count):
        of()
    return counted[0], counted[1] // ROWS


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return formulas of operations for which torch has none, a batch of matrices included."""
    aten, known = torch.ops.aten, operation_counts()

    def batch(shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-2])

    def qr(x: Tensor, *args: Any, **options: Any) -> int:
        m, n = x.shape[-2:]
        k = min(m, n)
        return round(batch(x.shape) * (4 * m * n * k - 4 / 3 * k**3))

    def cubed(times: float) -> Callable[..., int]:
        return lambda x, *args, **options: round(batch(x.shape) * times * x.shape[-1] ** 3)

    def products(x: Tensor, *args: Any, **options: Any) -> int:
        return 2 * x.numel()

    return {
        aten.linalg_qr: qr,
        aten._linalg_eigh: cubed(9),
        aten.linalg_cholesky_ex: cubed(1 / 3),
        aten.cholesky_inverse: cubed(2 / 3),
        aten.addmm_: known[aten.addmm],
        aten.baddbmm_: known[aten.baddbmm],
        aten.mv: products,
        aten.dot: products,
    }
