"""How a layer's Fisher block is held: as a Kronecker product of two factors, or itself, whole or in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import optree
from torch import Tensor
from torch.func import vmap

from lrkfac.core.checks import need_choice, need_flag
from lrkfac.core.corrected import CorrectedStructure
from lrkfac.core.factors import FactorStructure, dense
from lrkfac.core.kronecker import KroneckerStructure
from lrkfac.core.operators import Operator
from lrkfac.core.rows import RowCovariance
from lrkfac.core.types import Treatment


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


ProductStructure = KroneckerStructure | CorrectedStructure
Structure = ProductStructure | BlockStructure


def kronecker(
    input: FactorStructure, output: FactorStructure, treatment: Treatment = "expand", corrected: bool = False
) -> ProductStructure:
    """A layer's Fisher block as ``B ⊗ A`` (Martens & Grosse 2015, arXiv 1503.05671, section 3).

    Where an example uses the weight several times (positions of a convolution or a sequence, uses of a shared
    weight), its gradient is ``Σ_t g_t a_tᵀ``. Of that, ``"expand"`` takes every term for an example of its own, and
    ``"reduce"`` the product of the sum of ``g_t`` and the mean of ``a_t`` (Eschenhagen et al. 2023, arXiv
    2311.00636): cheaper, as there is one row for each example, and exact where the outputs are averaged over
    positions and everything is linear. Without sharing the two are the same.

    Args:
        input: What holds ``A``, the second moment of the layer's inputs.
        output: What holds ``B``, the second moment of the gradients at the layer's outputs.
        treatment: ``"expand"`` or ``"reduce"``. An embedding's one-hot side is diagonal with the first alone; with
            the second, which makes histograms of it, the diagonal is what is held.
        corrected: Whether eigenvalues are measured in the factors' eigenbasis instead of being products (EKFAC,
            George et al. 2018, arXiv 1806.03884), see ``CorrectedStructure``: the best in that basis, at the price of
            the gradients of single examples. Embeddings stay products.

    Raises:
        TypeError: If a factor is not one of ``dense()``, ``diagonal()``, ``low_rank(rank)`` and
            ``low_rank_plus_diagonal(rank)``, or an object with the same methods; if ``corrected`` is no truth value.
        ValueError: If ``treatment`` is unknown.
    """
    for name, value in {"input": input, "output": output}.items():
        methods = ("fitted", "init", "update", "operator", "inverse")
        if isinstance(value, ProductStructure) or not all(hasattr(value, method) for method in methods):
            raise TypeError(f"{name}: expected a factor structure such as dense() or low_rank(32), got {value!r}")
    need_choice(treatment, "treatment", get_args(Treatment))
    need_flag(corrected, "corrected")
    factors = KroneckerStructure(input, output, treatment)
    return CorrectedStructure(factors) if corrected else factors


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
