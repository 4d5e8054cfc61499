"""Structures: how a layer's block of the Fisher matrix is represented, averaged over time and inverted.

Factor structures (``dense``, ``diagonal``, ``low_rank``, ``low_rank_plus_diagonal``) stand inside ``kronecker``; with
``unit_wise``, ``layer_wise`` and ``full``, and ``diagonal`` alone, it is a structure of a whole block.

``FactorStructure`` is the base class of custom factors.
"""

from lrkfac.core.curvature.exact import full, layer_wise, unit_wise
from lrkfac.core.curvature.factors import dense, diagonal
from lrkfac.core.curvature.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.curvature.structures import kronecker

__all__ = [
    "FactorStructure",
    "dense",
    "diagonal",
    "full",
    "kronecker",
    "layer_wise",
    "low_rank",
    "low_rank_plus_diagonal",
    "unit_wise",
]
