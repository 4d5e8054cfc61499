"""Curvature as a tool: products with the Gauss-Newton, Fisher and Hessian matrix of any pure function and data set.

Their solvers, spectra and traces are in ``lrkfac.linalg``.
"""

from lrkfac.core.evaluation.data_rules import fisher_product, ggn, hessian

__all__ = [
    "fisher_product",
    "ggn",
    "hessian",
]
