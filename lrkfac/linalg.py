"""Symmetric operators that are applied without being formed, their inverses, and stateless iterations.

An operator is a NamedTuple of tensors, a pytree for ``optree`` and ``torch.func`` alike. Inversion returns an
operator of the same class, but for exactly damped Kronecker products. A custom operator takes part in each function by
a method of the same name.
"""

from lrkfac.core.linalg.conjugate_gradient import conjugate_gradient
from lrkfac.core.linalg.damping import damped, inverse
from lrkfac.core.linalg.determinants import logdet
from lrkfac.core.linalg.eigen import power_iteration, subspace_iteration
from lrkfac.core.linalg.eigenspaces import LowRankPlusIsotropic
from lrkfac.core.linalg.eigenvalues import eigenvalues
from lrkfac.core.linalg.entries import diagonal, quadratic_form, scale, trace
from lrkfac.core.linalg.estimates import diagonal_estimate, trace_estimate
from lrkfac.core.linalg.inverses import sherman_morrison, woodbury
from lrkfac.core.linalg.lanczos import lanczos
from lrkfac.core.linalg.operator_checks import to_dense
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal
from lrkfac.core.linalg.polar import polar
from lrkfac.core.linalg.square_roots import inverse_root, root, sample, solve

__all__ = [
    "Dense",
    "Diagonal",
    "Kronecker",
    "LowRankPlusDiagonal",
    "LowRankPlusIsotropic",
    "conjugate_gradient",
    "damped",
    "diagonal",
    "diagonal_estimate",
    "eigenvalues",
    "inverse",
    "inverse_root",
    "lanczos",
    "logdet",
    "polar",
    "power_iteration",
    "quadratic_form",
    "root",
    "sample",
    "scale",
    "sherman_morrison",
    "solve",
    "subspace_iteration",
    "to_dense",
    "trace",
    "trace_estimate",
    "woodbury",
]
