"""What a preconditioner will cost, before any step: bytes of its state and operations of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_dtype
from lrkfac.core.base.private_torch import intercept, operation_counts
from lrkfac.core.base.text import short, table
from lrkfac.core.curvature.assignment import RANK, Block, Chosen, blocks, ranks_of
from lrkfac.core.curvature.blocks import Held, apply, refresh
from lrkfac.core.curvature.exact import BlockStructure
from lrkfac.core.curvature.factors import DenseStructure, DiagonalStructure
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure, LowRankStructure
from lrkfac.core.curvature.precondition import Part, in_parts, of_product
from lrkfac.core.curvature.ranks import (
    COUNTER,
    AutoRank,
    dtype_at_start,
    form_of,
    free,
    held_at_start,
    ranks_within,
    resolved,
    size_of,
)
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.layers.kinds import LINEAR, LinearOptions
from lrkfac.core.layers.statistics import Statistics

ROWS = 1_000_003
"""A number of rows that is no other length, so that it tells what is done for each row."""


class Cost(NamedTuple):
    """Of a layer (or of all); operations are multiplications and additions, one each.

    Attributes:
        held: How, in words.
        bytes: Of the tensors of its state, after ``init`` and at all times.
        apply: Operations to precondition its gradient as a matrix, in each step.
        refresh: Operations of a batch of statistics, whatever its size: bases, eigenpairs, inverses.
        refresh_per_row: What each row adds to them: an example, or a position of it, of a sample of the estimator.
    """

    held: str
    bytes: int
    apply: int
    refresh: int
    refresh_per_row: int


class Explanation(NamedTuple):
    """What ``explain`` found; ``print`` shows it as a table.

    Attributes:
        layers: The cost of each layer by name, of all together under ``""`` where one block holds them.
        ranks: The rank of each layer that takes the default structure, for ``rank=``.
        total: Of the whole state.
    """

    layers: dict[str, Cost]
    ranks: dict[str, int]
    total: Cost

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "held by", "bytes", "apply [op]", "refresh [op]", "per row [op]")]
        for name, cost in [*self.layers.items(), ("all", self.total)]:
            operations = (cost.apply, cost.refresh, cost.refresh_per_row)
            rows.append((name or "(all layers)", cost.held, f"{cost.bytes:,}", *[short(x) for x in operations]))
        return table(rows, right=True)


def explain(
    layers: Layers,
    structure: Chosen = None,
    *,
    rank: AutoRank | None = None,
    budget: int | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Bytes and operations of ``precondition_by_fisher(layers, structure, rank=rank)``, per layer and in all.

    Bytes are those of all tensors in its state, exactly; some share memory in a plain chain, none in
    ``adaptive_low_rank_kfac``. Operations are counted along the code itself, on tensors without numbers: matrix
    products by ``torch.utils.flop_counter``, QR as 4 m n² - 4/3 n³, symmetric eigenproblems as 9 n³, Cholesky and its
    inverse as n³ (Golub & Van Loan); what goes through entries one by one is left out, as are the gradients of single
    examples that exact blocks need. A convolution counts as the
    product with its rows that it is (and held densely, takes twice as much per row).

    Args:
        layers: From ``find_layers``.
        structure: As for ``precondition_by_fisher``.
        rank: Of its default structure; see there.
        budget: Chooses that rank: the largest for which the whole state takes at most so many bytes, common to all
            layers, and one more for as many of them as then fit. ``explain(...).ranks`` is taken by ``rank=``.
        dtype: Of the factors; by default, as for ``precondition_by_fisher``, float64 if a layer's parameters were when
            the layers were found, else float32.

    Raises:
        ValueError: If both ``rank`` and ``budget`` are given, not even rank 1 fits, or as ``precondition_by_fisher``.
        TypeError: If an argument has the wrong type.
    """
    check_layers(layers)
    if dtype is not None:
        check_dtype(dtype)
    if budget is not None and rank is not None:
        raise ValueError(f"budget: expected rank or budget, got both, rank={rank!r}; leave one of them out")
    chosen = resolved(layers, structure, rank) if budget is None else ranks_within(layers, structure, budget, dtype)
    held = blocks(layers, structure, chosen)
    costs: dict[str, Cost] = {}
    known: dict[Any, Cost] = {}
    for block in held:
        held_in = dtype or dtype_at_start(block)
        form = form_of(block), held_in
        if form not in known:
            known[form] = _cost(block, held_in)
        costs[block.name] = known[form]
    ranks = {name: r for name, r in ranks_of(layers, RANK if chosen is None else chosen).items() if name in free(held)}
    totals = (sum(getattr(cost, name) for cost in costs.values()) for name in Cost._fields[1:])
    total = Cost("", *totals)
    return Explanation(costs, ranks, total._replace(bytes=total.bytes + COUNTER * len(held)))


def _cost(block: Block, dtype: torch.dtype) -> Cost:
    held = held_at_start(block, dtype)
    one = _one_group(block)
    start = held_at_start(one, dtype)
    groups = block.layers[0].groups if len(block.layers) == 1 else 1

    def natural() -> Any:
        if isinstance(one.structure, KroneckerStructure) and in_parts(block):
            (layer,) = one.layers
            joint = layer.bias is not None
            weight = torch.empty(layer.d_out, layer.d_in - joint, dtype=dtype, device="meta")
            return of_product(start.inverse, Part(weight, weight.new_empty(layer.d_out) if joint else None))
        shapes = [(x.groups * x.d_out, x.d_in) for x in one.layers]
        return apply(one, start.inverse, [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes])

    refreshed, per_row = _operations(partial(_refreshed, one, start, ROWS, dtype))
    applied, _ = _operations(natural)
    return Cost(_words(block), size_of(held), groups * applied, groups * refreshed, groups * per_row)


def _one_group(block: Block) -> Block:
    """The block of one group, as a product with rows."""
    if isinstance(block.structure, BlockStructure):
        layers = block.layers if len(block.layers) > 1 else (replace(block.layers[0], groups=1),)
        return block._replace(layers=layers)
    (layer,) = block.layers
    plain = replace(layer, kinds=(LINEAR.name,), options=(tuple(LinearOptions()),), groups=1, batched=True)
    return block._replace(layers=(plain,))


def _refreshed(block: Block, held: Held, rows: int, dtype: torch.dtype) -> Any:
    """A refresh with a number of rows, of numbers that do not matter."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    structure, layer = block.structure, block.layers[0]
    if isinstance(structure, BlockStructure):
        whole = sum(x.groups * x.d_out * x.d_in for x in block.layers)
        shape = (rows, whole, 1) if structure.per == "model" else (rows, layer.d_out, layer.d_in)
        new = structure.update(held.state, empty(*shape), empty(), 0.9)
        return structure.inverse(new, 1.0)
    a, g = empty(rows, layer.d_in - (layer.bias is not None)), empty(1, rows, layer.d_out)
    return refresh(block, held, Statistics({layer.name: (a,)}, {layer.name: (g,)}, empty()), 1.0, 0.9)


def _operations(of: Callable[[], Any]) -> tuple[int, int]:
    """Multiplications and additions of matrix products and decompositions: without rows, and for each of ``ROWS``."""
    formulas = {**operation_counts(), **_formulas()}
    found = [0, 0]

    def count(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = operation(*args, **kwargs)
        if operation.overloadpacket in formulas:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
            number = formulas[operation.overloadpacket](*args, **kwargs, out_val=result)
            of_rows = any(ROWS in shape for shape in shapes if isinstance(shape, tuple))
            found[of_rows] += number
        return result

    with intercept(count):
        of()
    return found[0], found[1] // ROWS


def _formulas() -> dict[Any, Callable[..., int]]:
    """Operations of what torch has no formula for, a batch of matrices included."""
    aten, known = torch.ops.aten, operation_counts()

    def batch(shape: tuple[int, ...], own: int) -> int:
        return math.prod(shape[:-own])

    def qr(x: Tensor, *args: Any, **options: Any) -> int:
        m, n = x.shape[-2:]
        k = min(m, n)
        return round(batch(x.shape, 2) * (4 * m * n * k - 4 / 3 * k**3))

    def cubed(times: float) -> Callable[..., int]:
        return lambda x, *args, **options: round(batch(x.shape, 2) * times * x.shape[-1] ** 3)

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


def _words(block: Block) -> str:
    """How a block is held."""
    structure = block.structure
    if isinstance(structure, BlockStructure):
        return f"{_factor(structure.factor)} per {structure.per}"
    factors = structure if isinstance(structure, KroneckerStructure) else structure.factors
    corrected = "" if structure is factors else ", corrected"
    return f"A {_factor(factors.input)}, B {_factor(factors.output)}{corrected}"


def _factor(structure: Any) -> str:
    if isinstance(structure, LowRankStructure):
        return f"rank {structure.rank}"
    if isinstance(structure, LowRankPlusDiagonalStructure):
        return f"rank {structure.rank} + diagonal"
    plain = {DenseStructure: "dense", DiagonalStructure: "diagonal"}
    return plain.get(type(structure), type(structure).__name__)
