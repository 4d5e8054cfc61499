"""Refresh: new averages and their damped inverses, from the statistics of a batch.

Blocks of equal layers are refreshed in one call, so that the number of operations does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating, floating_dtype
from lrkfac.core.base.eager import has_values
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import BlockState, by_group, damped_inverse, packed
from lrkfac.core.curvature.covariances import WITH_PLAIN_ROWS
from lrkfac.core.curvature.examples import JointStatistics, LayerStatistics
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.layers.statistics import Statistics, Uses

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
"""Kinds that become grouped convolutions where several layers are mapped over."""


LARGEST = {"cpu": 2**24}
"""Numbers of statistics that are stacked at most, by type of device: beyond, the operations of one layer take longer
than the copy that stacks them is worth. Measured on one CPU core.
"""


LARGEST_ELSEWHERE = 2**26
"""The same on other devices, by the time that copies (some TB/s) and starts of operations (some µs) take there: 256 MB
are copied in the time of a few of the about hundred operations that a stack saves for each layer.
"""


LARGEST_OF_CONVOLUTIONS = 2**18
"""The same of convolutions, on all devices: grouped ones of more numbers took up to twice as long on a CPU, and the
kernels of other devices for them are no better than one after another.
"""


def refresh(
    blocks: Sequence[Block],
    states: Mapping[str, BlockState],
    statistics: Statistics,
    dampings: Mapping[str, float | Tensor],
    decay: float | Tensor,
) -> dict[str, BlockState]:
    """Return the state of each block after a batch; the last one, itself, where there are no statistics of a block.

    A scale or shift with the default structure also keeps its last state where there are no output gradients:
    normalised inputs have the second moment 1, so that with ``B = I`` its block would be the identity.

    Args:
        blocks: All blocks.
        states: Their states, by name.
        statistics: Of a batch. They are reduced in the dtype of the averages.
        dampings: ``λ`` for each block, by name.
        decay: Decay of the running averages.

    Raises:
        ValueError: If statistics of a layer are missing, have no gradients where the structure needs them, or have no
            finite inverse; names the layer.
    """
    due = [block for block in blocks if _is_due(block, statistics)]
    refreshed: dict[str, BlockState] = {}
    for numbers in packed([_candidate(block, states[block.name], statistics) for block in due]):
        stack = [due[i] for i in numbers]
        try:
            refreshed.update(_refresh_stack(stack, states, statistics, dampings, decay))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"layer {_culprit(stack, statistics)!r}: no inverse of its factors: its statistics, or damping or "
                f"decay where they are tensors, are not finite or out of range ({error})"
            ) from error
    return {block.name: refreshed.get(block.name, states[block.name]) for block in blocks}


def _refresh_stack(
    stack: list[Block],
    states: Mapping[str, BlockState],
    statistics: Statistics,
    dampings: Mapping[str, float | Tensor],
    decay: float | Tensor,
) -> dict[str, BlockState]:
    """Refresh blocks of equal layers: by batched operations, or else mapped over; a block alone needs neither."""
    first = stack[0]
    dtype = floating_dtype(states[first.name].average)
    operands = [(states[block.name].average, _uses(block, statistics, dtype)) for block in stack]
    update = _Refresh(first, statistics.scale.to(dtype), decay)
    each = [dampings[block.name] for block in stack]
    if len(stack) == 1:
        return {first.name: update.of_groups(each[0], *operands[0])}
    common = all(one is each[0] for one in each)
    device = statistics.scale.device
    damping = each[0] if common else torch.stack([torch.as_tensor(one, device=device) for one in each])
    average, uses = optree.tree_map(lambda *x: torch.stack(x), *operands)
    if _has_plain_rows(first):
        refreshed = update(damping, average, uses, stacked=True)
    else:
        refreshed = vmap(update.of_groups, in_dims=(None if common else 0, 0, 0))(damping, average, uses)
    leaves, structure = optree.tree_flatten(refreshed)
    # Laid out as those of a block alone; what is repeated along an axis stays so.
    tidy = [x if 0 in x.stride() else x.contiguous() for x in leaves]
    members = zip(*[x.unbind() for x in tidy], strict=True)
    return {b.name: optree.tree_unflatten(structure, list(x)) for b, x in zip(stack, members, strict=True)}


@dataclass(frozen=True, eq=False)
class _Refresh:
    """The refresh of a block, as a function of tensors: damping, average, and each layer's inputs and gradients."""

    block: Block
    scale: Tensor
    decay: float | Tensor

    def of_groups(self, damping: float | Tensor, average: Any, uses: tuple[tuple[Uses, Uses], ...]) -> BlockState:
        """Refresh all groups of a layer."""
        mapped = by_group(self.block, lambda average, uses: self(damping, average, uses))
        state: BlockState = mapped(average, uses)
        return state

    def __call__(
        self, damping: float | Tensor, average: Any, uses: tuple[tuple[Uses, Uses], ...], stacked: bool = False
    ) -> BlockState:
        """Refresh one group of a layer, or of several layers that are stacked."""
        layers, structure = self.block.layers, self.block.structure
        statistics: LayerStatistics | JointStatistics
        if structure.joins_layers:
            each = tuple((layer, *pair) for layer, pair in zip(layers, uses, strict=True))
            statistics = JointStatistics(each, self.scale)
        else:
            statistics = LayerStatistics(layers[0], *uses[0], self.scale, stacked)
        new = structure.update_from(average, statistics, self.decay)
        return BlockState(new, *damped_inverse(structure, new, damping))


def _uses(block: Block, statistics: Statistics, dtype: torch.dtype) -> tuple[tuple[Uses, Uses], ...]:
    """Return inputs and output gradients of each of the block's layers in a dtype, with groups in front."""
    pairs = []
    for layer in block.layers:
        inputs, gradients = (
            split_groups(layer, tuple([floating(x, dtype) for x in of[layer.name]]))
            for of in (statistics.inputs, statistics.output_gradients)
        )
        pairs.append((inputs, gradients))
    return tuple(pairs)


def _is_due(block: Block, statistics: Statistics) -> bool:
    """Return whether there are statistics to refresh the block from.

    Raises:
        ValueError: If they are those of other layers, or lack what the structure needs.
    """
    for layer in block.layers:
        if layer.name not in statistics.inputs:
            raise ValueError(
                f"evaluation: no statistics of layer {layer.name!r}; make evaluator() and the transformation from the "
                "same layers"
            )
    missing = [layer.name for layer in block.layers if not statistics.inputs[layer.name]]
    if len(missing) == len(block.layers):
        return False
    if missing:
        raise ValueError(f"statistics: full() holds all layers together and cannot do without those of {missing}")
    name = block.layers[0].name
    if block.structure.needs_gradients and not statistics.output_gradients[name]:
        if block.implied:
            return False
        raise ValueError(
            f"structure: layer {name!r} is held by {block.structure.form} block, which needs the "
            'gradients at the layer\'s outputs: the estimator "forward_only" takes none; use kronecker(...), '
            "uncorrected, or another estimator"
        )
    return True


def _candidate(block: Block, state: BlockState, statistics: Statistics) -> tuple[Any, int, int]:
    """Return what blocks in one stack share, ``None`` for one that stays alone; its size; and the largest stack."""
    layer = block.layers[0]
    kinds = set(layer.kinds)
    if not block.structure.mappable or not kinds <= WITH_PLAIN_ROWS | CONVOLUTIONS:
        return None, 0, 0
    rows = [*statistics.inputs[layer.name], *statistics.output_gradients[layer.name]]
    tensors = [(tuple(x.shape), x.dtype, x.device) for x in (*rows, *optree.tree_leaves(state.average))]
    sizes = (layer.d_in, layer.d_out, layer.groups, layer.bias is None)
    largest = LARGEST.get(rows[0].device.type, LARGEST_ELSEWHERE)
    if kinds & CONVOLUTIONS:
        largest = min(largest, LARGEST_OF_CONVOLUTIONS)
    return (block.structure, layer.kinds, layer.options, sizes, tensors), sum(x.numel() for x in rows), largest


def _has_plain_rows(block: Block) -> bool:
    """Return whether a stack needs no ``vmap``: rows are at hand, and the structure takes those of several layers."""
    kinds = set(block.layers[0].kinds)
    return block.structure.stackable and len(kinds) == 1 and kinds <= WITH_PLAIN_ROWS


def _culprit(stack: list[Block], statistics: Statistics) -> str:
    """Return the name of the first layer whose statistics are not finite, else that of the first of all."""
    layers = [layer for block in stack for layer in block.layers]
    for layer in layers:
        tensors = [*statistics.inputs[layer.name], *statistics.output_gradients[layer.name]]
        if any(has_values(x) and not bool(x.isfinite().all()) for x in tensors):
            return layer.name
    return layers[0].name
