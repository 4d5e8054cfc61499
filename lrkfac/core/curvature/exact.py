"""Exact blocks: the second moment of the gradients of single examples, per unit, layer or model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import optree
from torch import Tensor
from torch.func import vmap

from lrkfac.core.curvature.factors import FactorStructure, dense
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.core.linalg.operators import Operator


@dataclass(frozen=True)
class BlockStructure:
    """See ``layer_wise``, ``unit_wise`` and ``full``: the second moment of the examples' gradients themselves.

    Attributes:
        factor: What holds one block.
        per: Whether a block is made for each output unit of a layer, for each layer (each group of it), or for
            all layers together.
    """

    factor: FactorStructure
    per: Literal["unit", "layer", "model"]

    def fitted(self, d_in: int, d_out: int) -> BlockStructure:
        """The structure to use for a layer of this size."""
        return BlockStructure(self.factor.fitted(d_in if self.per == "unit" else d_in * d_out), self.per)

    def init(self, d_in: int, d_out: int, like: Tensor) -> Any:
        """The state before the first batch; of ``d_out`` blocks where there is one for each unit."""
        if self.per != "unit":
            return self.factor.init(d_in * d_out, like)
        return optree.tree_map(lambda x: x.expand(d_out, *x.shape).clone(), self.factor.init(d_in, like))

    def update(self, state: Any, rows: Tensor, scale: Tensor, decay: float | Tensor) -> Any:
        """The state after one more batch, whose examples' gradients are ``rows`` ``[n, d_out, d_in]``."""
        if self.per != "unit":
            return self.factor.update(state, RowCovariance(rows.flatten(1), scale), decay)

        def one(state: Any, rows: Tensor) -> Any:
            return self.factor.update(state, RowCovariance(rows, scale), decay)

        return vmap(one, in_dims=(0, 1))(state, rows)

    def dampings(self, state: Any, damping: float | Tensor) -> Tensor:
        """The damping in the inverse, ``[]``."""
        like = next(x for x in optree.tree_leaves(state) if x.is_floating_point())
        return (like.new_zeros(()) + damping).to(like.dtype)

    def inverse(self, state: Any, damping: float | Tensor) -> Operator:
        """``(block + damping I)⁻¹``, of every unit where there is a block for each."""
        if self.per != "unit":
            return self.factor.inverse(state, damping)
        return vmap(lambda one: self.factor.inverse(one, damping))(state)

    def apply(self, inverse: Operator, gradient: Tensor) -> Tensor:
        """The natural gradient ``[d_out, d_in]``."""
        if self.per != "unit":
            return inverse.matvec(gradient.reshape(-1)).reshape(gradient.shape)
        return vmap(lambda one, row: one.matvec(row))(inverse, gradient)


def unit_wise() -> BlockStructure:
    """One exact block ``E[z zᵀ]`` for each output unit, ``z`` ``[d_in]`` an example's gradient of the unit's weights.

    What scales and shifts of normalisations are held by: a block of 2 × 2 numbers for each unit.
    """
    return BlockStructure(dense(), "unit")


def layer_wise() -> BlockStructure:
    """One exact block for each layer (for each group of a convolution), in O((d_in d_out)²) memory."""
    return BlockStructure(dense(), "layer")


def full() -> BlockStructure:
    """The exact Fisher matrix of all covered parameters together: for small models and for comparison."""
    return BlockStructure(dense(), "model")
