"""How a layer's Fisher block is represented: as a Kronecker product, or exactly."""

from __future__ import annotations

from typing import get_args

from lrkfac.core.base.arguments import check_choice, check_flag
from lrkfac.core.curvature.ekfac import EigenbasisStructure
from lrkfac.core.curvature.exactly_damped import ExactlyDampedStructure
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.layers.description import Treatment

ProductStructure = KroneckerStructure | EigenbasisStructure


def kronecker(
    input: FactorStructure,
    output: FactorStructure,
    treatment: Treatment = "expand",
    corrected: bool = False,
    exact_damping: bool = False,
) -> ProductStructure:
    """Represent a layer's Fisher block as ``B ⊗ A`` (Martens & Grosse 2015, arXiv 1503.05671, section 3).

    Where an example uses the weight several times (positions of a convolution or a sequence, uses of a shared
    weight), its gradient is ``Σ_t g_t a_tᵀ``. ``"expand"`` takes each term for a separate example. ``"reduce"`` takes
    the product of the sum of ``g_t`` and the mean of ``a_t`` (Eschenhagen et al. 2023, arXiv 2311.00636): cheaper, as
    there is one row for each example, and exact where the outputs are averaged over positions and everything is linear.
    Without sharing the two are the same.

    Args:
        input: Structure of ``A``, the second moment of the layer's inputs.
        output: Structure of ``B``, the second moment of the gradients at the layer's outputs.
        treatment: ``"expand"`` or ``"reduce"``. The one-hot side of an embedding is represented by its diagonal, which
            is exact with ``"expand"``.
        corrected: Whether to measure eigenvalues in the factors' eigenbasis, instead of taking products (EKFAC,
            George et al. 2018, arXiv 1806.03884), see ``EigenbasisStructure``: the best in that basis, at the price of
            the gradients of single examples. Embeddings stay products.
        exact_damping: Whether to invert ``B ⊗ A + λ I`` itself, instead of ``(B + δ_B I) ⊗ (A + δ_A I)`` with
            ``δ_A δ_B = λ``, which has the cross terms ``δ_B A + δ_A B`` in addition and so damps more with the same
            ``λ``. It takes eigenvectors of one factor, which ``low_rank``, ``dense`` and ``diagonal`` have; see
            ``lrkfac.linalg.inverse`` for formula and price. With ``low_rank`` on both sides it costs no more than split
            damping; beside ``low_rank_plus_diagonal(k)`` the inverse holds ``(r + 1) d (k + 2)`` numbers.

    Returns:
        A structure for ``precondition_by_fisher``.

    Raises:
        TypeError: If a factor is none of ``dense()``, ``diagonal()``, ``low_rank(rank)``,
            ``low_rank_plus_diagonal(rank)`` and instances of a custom subclass of ``FactorStructure``; if
            ``corrected`` is no truth value.
        ValueError: If ``treatment`` is unknown; if ``exact_damping`` is asked for with ``low_rank_plus_diagonal`` on
            both sides, or with ``corrected``, whose damping is exact anyway.

    Examples:
        >>> from lrkfac.structures import dense, kronecker, low_rank
        >>> kronecker(low_rank(8), dense()).description()
        'A rank 8, B dense'
    """
    for name, value in {"input": input, "output": output}.items():
        if not isinstance(value, FactorStructure):
            raise TypeError(
                f"{name}: expected a factor structure such as dense() or low_rank(32), or one of a custom subclass of "
                f"FactorStructure, got {value!r}"
            )
    check_choice(treatment, "treatment", get_args(Treatment))
    check_flag(corrected, "corrected")
    check_flag(exact_damping, "exact_damping")
    if exact_damping:
        return _exactly_damped(input, output, treatment, corrected)
    factors = KroneckerStructure(input, output, treatment)
    return EigenbasisStructure(factors) if corrected else factors


def _exactly_damped(
    input: FactorStructure, output: FactorStructure, treatment: Treatment, corrected: bool
) -> ExactlyDampedStructure:
    if corrected:
        raise ValueError("exact_damping: corrected=True is damped exactly as it is; leave exact_damping out")
    if all(isinstance(side, LowRankPlusDiagonalStructure) for side in (input, output)):
        raise ValueError(
            "exact_damping: expected eigenvectors of one side, got low_rank_plus_diagonal on both; use low_rank(rank) "
            "or dense() for one of them"
        )
    return ExactlyDampedStructure(input, output, treatment)
