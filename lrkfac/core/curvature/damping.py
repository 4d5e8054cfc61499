"""Dampings by block, where blocks differ by orders of magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.blocks import BlockState, mean_eigenvalue_of
from lrkfac.core.curvature.owners import Division
from lrkfac.core.curvature.stacking import together

FIRST_DECADES, FULL_DECADES = 3.0, 3.5
"""Spread of block sizes, in decades, at which damping begins to follow them, and at which it follows them fully."""
LOWEST_DECADE = -6.0
"""Sizes are cut off so many decades below the largest: those of a block that dies fall without end."""


def balanced_dampings(
    blocks: Sequence[Block],
    states: Mapping[str, BlockState],
    damping: float | Tensor,
    division: Division | None = None,
) -> dict[str, Tensor]:
    """Return ``λ (s / max s)^p`` for each block, by name; ``s`` is the mean eigenvalue of its average.

    ``p`` rises from 0 to 1 while ``max s / min s`` does from 1000 to 3200. No block has less than a millionth of ``λ``.
    A block whose average is zero or not finite has ``λ`` and does not count. With ``division``, each process has the
    states of its own blocks.
    """
    if not blocks:
        return {}
    own = [block for block in blocks if division is None or division.own(block)]
    each = _mean_eigenvalues(own, states, stacks=division is None)
    if division is not None:
        each = division.numbers(each)
    first = each[blocks[0].name].dtype
    sizes = torch.stack([each[block.name].to(first) for block in blocks])
    known = (sizes > 0) & sizes.isfinite()
    logs = torch.where(known, sizes, 1.0).log10()
    largest = torch.where(known, logs, -torch.inf).amax()
    below = torch.where(known, logs - largest, 0.0).clamp(min=LOWEST_DECADE)
    power = ((-below.amin() - FIRST_DECADES) / (FULL_DECADES - FIRST_DECADES)).clamp(0, 1)
    dampings = damping * 10 ** (power * below)
    return {block.name: one for block, one in zip(blocks, dampings.unbind(), strict=True)}


def _mean_eigenvalues(blocks: Sequence[Block], states: Mapping[str, BlockState], stacks: bool) -> dict[str, Tensor]:
    """Return the mean eigenvalue of each block's average, by name.

    Args:
        blocks: The blocks.
        states: Their states, by name.
        stacks: Whether those of equal layers are computed together: rounding depends on which these are.
    """
    averages = {block.name: states[block.name].average for block in blocks}
    if not stacks:
        return {block.name: mean_eigenvalue_of(block, averages[block.name]) for block in blocks}

    def work(block: Block, damping: float | Tensor, average: Any, stacked: bool = False) -> Tensor:
        return block.structure.mean_eigenvalue(average)

    none = dict.fromkeys(averages, 0.0)
    means = together(work, blocks, none, [(one,) for one in averages.values()])
    return {name: one if one.ndim == 0 else one.mean() for name, one in zip(averages, means, strict=True)}
