"""The laws of the package as checkers, and hypothesis strategies that draw cases.

For tests of custom structures, operators, transformations, likelihoods and layer kinds. Each checker raises
``AssertionError`` with the law that broke and by how much. Strategies draw sizes, seeds, dtypes and condition numbers,
never raw arrays; ``torch.Generator`` makes the tensors from them.

It needs hypothesis, which the rest of the package does not.
"""

from importlib.util import find_spec

if find_spec("hypothesis") is None:
    message = "hypothesis: lrkfac.testing needs it, and it is not installed; python -m pip install hypothesis"
    raise ImportError(message, name="hypothesis")

from lrkfac.testing.architectures import Architecture, architectures
from lrkfac.testing.laws import check_inverse, check_structure, check_transformation
from lrkfac.testing.layer_kinds import check_layer_kind
from lrkfac.testing.likelihoods import check_likelihood
from lrkfac.testing.operators import check_operator
from lrkfac.testing.strategies import (
    LayerCase,
    covariances,
    dtypes,
    gradients,
    layers,
    low_rank_plus_diagonals,
    operators,
    seeds,
)

__all__ = [
    "Architecture",
    "LayerCase",
    "architectures",
    "check_inverse",
    "check_layer_kind",
    "check_likelihood",
    "check_operator",
    "check_structure",
    "check_transformation",
    "covariances",
    "dtypes",
    "gradients",
    "layers",
    "low_rank_plus_diagonals",
    "operators",
    "seeds",
]
