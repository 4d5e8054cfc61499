"""Curvature as a tool: products with the Gauss-Newton, Fisher and Hessian matrix of any pure function and data set.

Their solvers, spectra and traces are in ``lrkfac.linalg``.
"""

from lrkfac.core.curvature.layer_blocks import LayerBlocks
from lrkfac.core.evaluation.data_rules import fisher_product, ggn, hessian
from lrkfac.core.inference.estimate import estimate
from lrkfac.core.inference.from_state import from_state
from lrkfac.core.inference.influence import influence
from lrkfac.core.inference.laplace import Laplace, laplace
from lrkfac.core.inference.ntk import ntk
from lrkfac.core.linalg.density import SpectralDensity, spectral_density

__all__ = [
    "Laplace",
    "LayerBlocks",
    "SpectralDensity",
    "estimate",
    "fisher_product",
    "from_state",
    "ggn",
    "hessian",
    "influence",
    "laplace",
    "ntk",
    "spectral_density",
]
