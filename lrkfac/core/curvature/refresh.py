"""Blocks of equal form are refreshed in one batched call, so that the number of operations does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating, floating_dtype
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import Held, inverted, packed, refresh
from lrkfac.core.curvature.covariances import Factors
from lrkfac.core.curvature.factors import DenseStructure, DiagonalStructure
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure, LowRankStructure
from lrkfac.core.layers.description import Layer
from lrkfac.core.layers.kinds import BIAS, LINEAR
from lrkfac.core.layers.statistics import Statistics, Uses
from lrkfac.core.linalg.covariances import Covariance, DiagonalCovariance, RowCovariance, joined_rows

LARGEST = 2**24
"""Numbers of statistics that are stacked at most: beyond, operations are long enough to be made one by one."""


LARGEST_OF_CONVOLUTIONS = 2**18
"""The same of convolutions, which stacked become grouped ones: larger, they took up to twice as long on a CPU."""


CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def refresh_all(
    blocks: Sequence[Block],
    held: dict[str, Held],
    statistics: Statistics,
    dampings: Mapping[str, float | Tensor],
    decay: float | Tensor,
) -> dict[str, Held]:
    """``blocks.refresh`` of each block, by name, with its damping.

    Blocks of linear layers or convolutions with equal structure, sizes, options and shapes of statistics are
    stacked and refreshed together.

    Raises:
        ValueError: As ``blocks.refresh``.
    """
    found: dict[str, Held] = {}
    for group in _groups(blocks, held, statistics):
        if len(group) > 1:
            try:
                found.update(_together(group, held, statistics, dampings, decay))
                continue
            except ValueError:
                pass  # one of them is refused, by name, below
        for block in group:
            found[block.name] = refresh(block, held[block.name], statistics, dampings[block.name], decay)
    return {block.name: found[block.name] for block in blocks}


def _together(
    group: list[Block],
    held: dict[str, Held],
    statistics: Statistics,
    dampings: Mapping[str, float | Tensor],
    decay: float | Tensor,
) -> dict[str, Held]:
    first = group[0]
    each_damping = [dampings[b.name] for b in group]
    common = all(one is each_damping[0] for one in each_damping)
    damping = each_damping[0] if common else torch.stack([torch.as_tensor(one) for one in each_damping])
    each = [(held[b.name].state, statistics.inputs[b.name], statistics.output_gradients[b.name]) for b in group]
    stacked = optree.tree_map(lambda *x: torch.stack(x), *each)

    def one(damping: float | Tensor, state: Any, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Held:
        own = Statistics({first.name: inputs}, {first.name: gradients}, statistics.scale)
        return refresh(first, Held(state, (), ()), own, damping, decay)

    if _has_rows(first):
        refreshed = _by_rows(first, statistics.scale, damping, decay)(*stacked)
    else:
        refreshed = vmap(one, in_dims=(None if common else 0, 0, 0, 0))(damping, *stacked)
    leaves, structure = optree.tree_flatten(refreshed)
    # Laid out as those of a block alone; what is repeated along an axis stays so.
    tidy = [x if 0 in x.stride() else x.contiguous() for x in leaves]
    members = zip(*[x.unbind() for x in tidy], strict=True)
    return {b.name: optree.tree_unflatten(structure, list(own)) for b, own in zip(group, members, strict=True)}


def _has_rows(block: Block) -> bool:
    """Whether the rows of a layer are at hand, and what holds it takes those of several layers as they are."""
    (layer,), structure = block.layers, block.structure
    if len(set(layer.kinds)) > 1 or not set(layer.kinds) <= {LINEAR.name, BIAS.name}:
        return False
    assert isinstance(structure, KroneckerStructure)
    return structure.treatment == "expand" and all(
        isinstance(one, DenseStructure | DiagonalStructure)
        or (isinstance(one, LowRankStructure | LowRankPlusDiagonalStructure) and one.method == "subspace")
        for one in (structure.input, structure.output)
    )


def _by_rows(
    block: Block, scale: Tensor, damping: float | Tensor, decay: float | Tensor
) -> Callable[[Any, tuple[Tensor, ...], tuple[Tensor, ...]], Held]:
    """``refresh`` of blocks like this one, from their states and statistics, stacked: without ``vmap``."""
    (layer,), structure = block.layers, block.structure
    assert isinstance(structure, KroneckerStructure)

    def of_all(state: Any, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Held:
        dtype = floating_dtype(state)
        rows = [tuple([floating(x, dtype) for x in uses]) for uses in (inputs, gradients)]
        try:
            new = structure.update(state, *_stacked_factors(layer, scale.to(dtype), *rows), decay)
            return Held(new, *inverted(block, new, damping))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(str(error)) from error

    return of_all


def _stacked_factors(layer: Layer, scale: Tensor, inputs: Uses, gradients: Uses) -> Factors:
    """``covariances.factors`` of several layers like this one, from their statistics, stacked."""
    joint = layer.bias is not None
    if gradients:
        moment: Covariance = RowCovariance(joined_rows([_rows(g, layer.d_out) for g in gradients]), scale)
    else:
        moment = DiagonalCovariance(scale.new_ones(layer.d_out))
    rows = joined_rows([_rows(a, layer.d_in - joint) for a in inputs])
    return Factors(moment, RowCovariance(rows, rows.new_full((), 1 / max(rows.shape[-2], 1)), joint))


def _rows(x: Tensor, d: int) -> Tensor:
    return x.reshape(x.shape[0], -1, d)


def _groups(blocks: Sequence[Block], held: dict[str, Held], statistics: Statistics) -> list[list[Block]]:
    """Blocks that may be stacked, in the order of their first; the others alone."""

    def wanted(block: Block) -> tuple[Any, int, int]:
        convolved = CONVOLUTIONS.intersection(block.layers[0].kinds)
        return (*_form(block, held, statistics), min(LARGEST, LARGEST_OF_CONVOLUTIONS) if convolved else LARGEST)

    return [[blocks[i] for i in numbers] for numbers in packed([wanted(block) for block in blocks])]


def _form(block: Block, held: dict[str, Held], statistics: Statistics) -> tuple[Any, int]:
    """What blocks must have in common, and the numbers in their statistics; ``None`` for a block that stays alone."""
    (layer, *others) = block.layers
    stackable = isinstance(block.structure, KroneckerStructure) and set(layer.kinds) <= {
        LINEAR.name,
        BIAS.name,
        *CONVOLUTIONS,
    }
    if others or not stackable or not statistics.inputs.get(layer.name):
        return None, 0
    rows = [*statistics.inputs[layer.name], *statistics.output_gradients[layer.name]]
    tensors = [(tuple(x.shape), x.dtype, x.device) for x in (*rows, *optree.tree_leaves(held[block.name].state))]
    sizes = (layer.d_in, layer.d_out, layer.groups, layer.bias is None)
    return (block.structure, layer.kinds, layer.options, sizes, tensors), sum(x.numel() for x in rows)
