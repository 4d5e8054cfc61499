"""Weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrkfac.core.checks import need_number
from lrkfac.core.tree import add_scaled, check_like
from lrkfac.core.types import Tree
from lrkfac.transforms.base import GradientTransformation, need_params, stateless


def add_decayed_weights(weight_decay: float) -> GradientTransformation:
    """``u + weight_decay * params``: decoupled from the gradient where it stands after the preconditioner
    (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Args:
        weight_decay: A finite number ≥ 0.

    Raises:
        ValueError: If it is not; in ``update``, if ``params`` is missing or differs from the updates.
        TypeError: If an argument has the wrong type.
    """
    need_number(weight_decay, "weight_decay", 0)

    def change(updates: Tree, params: Tree, **extra: Any) -> Tree:
        check_like(updates, need_params(params, "add_decayed_weights"), "add_decayed_weights: params beside updates")
        decays = isinstance(weight_decay, Tensor) or weight_decay > 0
        return add_scaled(updates, weight_decay, params) if decays else updates

    return stateless(change)
