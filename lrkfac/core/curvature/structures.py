"""How a layer's Fisher block is represented: as a Kronecker product, or exactly."""

from __future__ import annotations

from typing import get_args

from lrkfac.core.base.arguments import check_choice, check_flag
from lrkfac.core.curvature.ekfac import CorrectedStructure
from lrkfac.core.curvature.exact import BlockStructure
from lrkfac.core.curvature.factors import FactorStructure
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.layers.description import Treatment

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
    check_choice(treatment, "treatment", get_args(Treatment))
    check_flag(corrected, "corrected")
    factors = KroneckerStructure(input, output, treatment)
    return CorrectedStructure(factors) if corrected else factors
