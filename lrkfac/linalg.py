"""Symmetric operators that are applied without being formed, their inverses, and stateless iterations.

An operator is a NamedTuple of tensors, a pytree for ``optree`` and ``torch.func`` alike. Inversion returns an
operator of the same class, but for exactly damped Kronecker products.
"""

from lrkfac.core.linalg.damping import inverse
from lrkfac.core.linalg.eigen import power_iteration, subspace_iteration
from lrkfac.core.linalg.eigenspaces import LowRankPlusIsotropic
from lrkfac.core.linalg.inverses import sherman_morrison, woodbury
from lrkfac.core.linalg.operator_checks import to_dense
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal
from lrkfac.core.linalg.polar import polar

__all__ = [
    "Dense",
    "Diagonal",
    "Kronecker",
    "LowRankPlusDiagonal",
    "LowRankPlusIsotropic",
    "inverse",
    "polar",
    "power_iteration",
    "sherman_morrison",
    "subspace_iteration",
    "to_dense",
    "woodbury",
]
