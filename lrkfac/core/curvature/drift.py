"""By how much factors have turned between two states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.curvature.factors import DenseState, DiagonalState
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalState, LowRankState
from lrkfac.core.curvature.spectra import inner, thin


def factor_drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Tensor]:
    """By how much each layer's factors have turned: the larger of the angles of the two, in radians, ``[]``.

    The angle between a factor ``M`` then and now is that between matrices, ``cos = tr(M M') / (‖M‖ ‖M'‖)``, which
    follows from thin products: 0 where only the scale has changed, π/2 between orthogonal ranges. Unlike the angle
    between two bases, it does not depend on how eigenvectors of nearly equal eigenvalues turn among each other. A
    layer whose factors turn little from one refresh to the next may be refreshed more seldom. In float32, angles below
    1e-3 are rounding.

    Args:
        before: ``state.factors`` of a ``PreconditionState``.
        after: The same later on.

    Raises:
        ValueError: If the layers differ, or what holds them.
        TypeError: If an argument is no mapping of states.
    """
    for what, given in (("before", before), ("after", after)):
        if not isinstance(given, Mapping) or not all(isinstance(x, Tensor) for x in optree.tree_leaves(dict(given))):
            raise TypeError(f"{what}: expected state.factors of a PreconditionState, got {type(given).__name__}")
    if set(before) != set(after):
        raise ValueError(f"after: expected factors of the layers {sorted(before)}, got {sorted(after)}")
    if optree.tree_structure(dict(before)) != optree.tree_structure(dict(after)):
        raise ValueError("after: expected factors held as those of before, got others; pass two states of one chain")
    return {name: torch.stack(_angles(before[name], after[name])).amax() for name in before}


def _angles(old: Any, new: Any) -> list[Tensor]:
    """Of all factors within two states; the largest of a factor's groups or units."""
    if isinstance(old, DenseState | DiagonalState | LowRankState | LowRankPlusDiagonalState):
        squares = _inner(old, old), _inner(new, new)
        lengths = (squares[0] * squares[1]).clamp(min=torch.finfo(old[0].dtype).tiny).sqrt()
        angle = (_inner(old, new) / lengths).clamp(-1, 1).acos()
        return [torch.where((squares[0] == 0) & (squares[1] == 0), 0, angle).amax()]
    return [angle for x, y in zip(old, new, strict=True) if isinstance(x, tuple) for angle in _angles(x, y)]


def _inner(old: Any, new: Any) -> Tensor:
    """``tr(M M')``, over the last axes."""
    if isinstance(old, DenseState):
        return (old.matrix * new.matrix).sum(dim=(-2, -1))
    if isinstance(old, DiagonalState):
        return (old.diagonal * new.diagonal).sum(dim=-1)
    return inner(thin(old), thin(new))
