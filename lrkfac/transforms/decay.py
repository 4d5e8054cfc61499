"""Weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrkfac.core.base.per_parameter import check_numbers, of_leaves
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import add_scaled
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.transforms.base import GradientTransformation, Stateless, check_params, transformation


def add_decayed_weights(weight_decay: PerParameter) -> GradientTransformation:
    """Return ``u + weight_decay * params``.

    After the preconditioner, weight decay is decoupled from the gradient (Loshchilov & Hutter 2019, arXiv
    1711.05101).

    Args:
        weight_decay: A finite number ≥ 0, or a tree of such like the parameters, or one that ends earlier:
            ``{"encoder": 0.0, "head": 1e-4}``.

    Returns:
        A transformation without state.

    Raises:
        ValueError: If a number is out of range; in ``init``, if a tree of numbers does not fit; in ``update``, if
            ``params`` is missing or differs from the updates.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> tx, params = add_decayed_weights(0.1), torch.ones(2)
        >>> tx.update(torch.zeros(2), tx.init(params), params)[0]
        tensor([0.1000, 0.1000])
    """
    return transformation(AddDecayedWeights(weight_decay))


@dataclass(frozen=True, eq=False)
class AddDecayedWeights(Stateless):
    """See ``add_decayed_weights``."""

    weight_decay: PerParameter

    def __post_init__(self) -> None:
        check_numbers(self.weight_decay, "weight_decay", 0)

    def change(self, updates: Tree, params: Tree, **extra: Any) -> Tree:
        params = check_params(params, "add_decayed_weights", updates)
        check_like(updates, params, "add_decayed_weights: params beside updates")
        if not isinstance(self.weight_decay, Tensor) and self.weight_decay == 0:
            return updates
        return add_scaled(updates, of_leaves(self.weight_decay, updates, "weight_decay"), params)

    def check_params(self, params: Tree) -> None:
        of_leaves(self.weight_decay, params, "weight_decay")
