"""Weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrkfac.core.base.per_parameter import check_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import add_scaled
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, check_params, stateless


def add_decayed_weights(weight_decay: PerParameter) -> GradientTransformation:
    """``u + weight_decay * params``: decoupled from the gradient where it stands after the preconditioner
    (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Args:
        weight_decay: A finite number ≥ 0, or a tree of such like the parameters, or one that ends earlier:
            ``{"encoder": 0.0, "head": 1e-4}``.

    Raises:
        ValueError: If it is not; in ``init``, if a tree of numbers does not fit; in ``update``, if ``params`` is
            missing or differs from the updates.
        TypeError: If an argument has the wrong type.
    """
    check_numbers(weight_decay, "weight_decay", 0)

    def change(updates: Tree, params: Tree, **extra: Any) -> Tree:
        check_like(updates, check_params(params, "add_decayed_weights"), "add_decayed_weights: params beside updates")
        if not isinstance(weight_decay, Tensor) and weight_decay == 0:
            return updates
        return add_scaled(updates, of_leaves(weight_decay, updates, "weight_decay"), params)

    return stateless(change, lambda params: of_leaves(weight_decay, params, "weight_decay"))
