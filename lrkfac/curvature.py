"""Curvature as a tool: products with the Gauss-Newton, Fisher and Hessian matrix of any pure function and data set.

Their solvers, spectra and traces are in ``lrkfac.linalg``.
"""

from lrkfac.core.evaluation.data_rules import fisher_product, ggn, hessian
from lrkfac.core.linalg.density import SpectralDensity, spectral_density

__all__ = [
    "SpectralDensity",
    "fisher_product",
    "ggn",
    "hessian",
    "spectral_density",
]
