"""Angles by which factors have turned between two states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.dtypes import floating_dtype


def factor_drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return by how much each layer's factors have turned: the larger of the angles of the two.

    The angle between a factor ``M`` then and ``M'`` now is that between matrices, ``cos = tr(M M') / (‖M‖ ‖M'‖)``,
    which follows from thin products. It is 0 where only the scale has changed, π/2 between orthogonal ranges. Unlike
    the angle between two bases, it does not depend on how eigenvectors of nearly equal eigenvalues turn among each
    other. A layer whose factors turn little from one refresh to the next may be refreshed more seldom. In float32,
    angles below 1e-3 are rounding.

    Args:
        before: ``state.factors`` of a ``PreconditionState``.
        after: The same later on.

    Returns:
        For each layer an angle in radians, ``[]``; the largest, where it has groups or units.

    Raises:
        ValueError: If the layers differ, or the structures that represent them.
        TypeError: If an argument is no mapping of states.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = torch.eye(3), torch.ones(4, 3), torch.tensor([0, 1, 2, 0])
        >>> model = lambda p, x: x @ p.T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> tx = lrkfac.precondition_by_fisher(layers, rank=1)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")(params, x, y)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> _, later = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        >>> bool(max(lrkfac.factor_drift(state.factors, later.factors).values()) < 2e-3)  # the same batch twice
        True
    """
    for what, averages in (("before", before), ("after", after)):
        if not isinstance(averages, Mapping) or not all(hasattr(x, "factor_states") for x in averages.values()):
            got = type(averages).__name__
            raise TypeError(f"{what}: expected state.factors of a PreconditionState, got {got}")
    if set(before) != set(after):
        raise ValueError(f"after: expected factors of the layers {sorted(before)}, got {sorted(after)}")
    if optree.tree_structure(dict(before)) != optree.tree_structure(dict(after)):
        raise ValueError(
            "after: expected factors represented as those of before, got others; pass two states of one chain"
        )
    return {name: _largest_angle(before[name], after[name]) for name in before}


def _largest_angle(old: Any, new: Any) -> Tensor:
    """Return the largest angle of all factors of a block, groups and units."""
    pairs = zip(old.factor_states(), new.factor_states(), strict=True)
    return torch.stack([_angle(*pair).amax() for pair in pairs]).amax()


def _angle(old: Any, new: Any) -> Tensor:
    """Return the angles between two states of a factor, over leading axes; 0 between two that are zero."""
    squares = old.inner(old), new.inner(new)
    lengths = (squares[0] * squares[1]).clamp(min=torch.finfo(floating_dtype(old)).tiny).sqrt()
    angle = (old.inner(new) / lengths).clamp(-1, 1).acos()
    return torch.where((squares[0] == 0) & (squares[1] == 0), 0, angle)
