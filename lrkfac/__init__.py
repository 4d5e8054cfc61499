"""Low-rank K-FAC as pure functions: natural gradient for functional PyTorch."""

from lrkfac import plot as plot
from lrkfac.chains import adaptive_low_rank_kfac, kfac, low_rank_kfac
from lrkfac.checkpoint import load, save
from lrkfac.core.costs import Explanation, explain
from lrkfac.core.factors import dense, diagonal
from lrkfac.core.families import bernoulli, categorical, gaussian, poisson
from lrkfac.core.find import find_layers
from lrkfac.core.fisher import fisher
from lrkfac.core.joint import joint
from lrkfac.core.likelihoods import Likelihood, Weights
from lrkfac.core.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.module import from_module
from lrkfac.core.operator_entries import to_dense
from lrkfac.core.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal
from lrkfac.core.own_kinds import LayerKind
from lrkfac.core.policy import staggered, staleness
from lrkfac.core.power_iteration import power_iteration, subspace_iteration
from lrkfac.core.sherman_morrison import inverse, sherman_morrison, woodbury
from lrkfac.core.structures import full, kronecker, layer_wise, unit_wise
from lrkfac.core.tree import formed
from lrkfac.core.types import Evaluation, Layer, Layers, Statistics
from lrkfac.core.unformed import Unformed
from lrkfac.diagnostics import Diagnosis, diagnose, ranks_by_trace
from lrkfac.optim import LowRankKFAC
from lrkfac.state_dicts import from_state_dict, state_dict
from lrkfac.transforms.accumulation import accumulate, merge_evaluations
from lrkfac.transforms.adam import scale_by_adam
from lrkfac.transforms.averaging import ema_params
from lrkfac.transforms.base import GradientTransformation, apply_updates, chain, identity
from lrkfac.transforms.clip import clip_by_global_norm, clip_by_kl, clip_by_value
from lrkfac.transforms.decay import add_decayed_weights
from lrkfac.transforms.hyperparameters import inject_hyperparameters
from lrkfac.transforms.masking import masked, partition
from lrkfac.transforms.momentum import trace
from lrkfac.transforms.precondition import precondition_by_fisher
from lrkfac.transforms.quadratic_model import scale_by_quadratic_model
from lrkfac.transforms.robust import apply_if_finite
from lrkfac.transforms.schedule import (
    constant_schedule,
    exponential_schedule,
    join_schedules,
    piecewise_constant_schedule,
    scale,
    scale_by_learning_rate,
    warmup_cosine_schedule,
)
from lrkfac.version import __version__ as __version__

__all__ = [
    "Dense",
    "Diagnosis",
    "Diagonal",
    "Evaluation",
    "Explanation",
    "GradientTransformation",
    "Kronecker",
    "Layer",
    "LayerKind",
    "Layers",
    "Likelihood",
    "LowRankKFAC",
    "LowRankPlusDiagonal",
    "Statistics",
    "Unformed",
    "Weights",
    "accumulate",
    "adaptive_low_rank_kfac",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "bernoulli",
    "categorical",
    "chain",
    "clip_by_global_norm",
    "clip_by_kl",
    "clip_by_value",
    "constant_schedule",
    "dense",
    "diagnose",
    "diagonal",
    "ema_params",
    "explain",
    "exponential_schedule",
    "find_layers",
    "fisher",
    "formed",
    "from_module",
    "from_state_dict",
    "full",
    "gaussian",
    "identity",
    "inject_hyperparameters",
    "inverse",
    "join_schedules",
    "joint",
    "kfac",
    "kronecker",
    "layer_wise",
    "load",
    "low_rank",
    "low_rank_kfac",
    "low_rank_plus_diagonal",
    "masked",
    "merge_evaluations",
    "partition",
    "piecewise_constant_schedule",
    "poisson",
    "power_iteration",
    "precondition_by_fisher",
    "ranks_by_trace",
    "save",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_quadratic_model",
    "sherman_morrison",
    "staggered",
    "staleness",
    "state_dict",
    "subspace_iteration",
    "to_dense",
    "trace",
    "unit_wise",
    "warmup_cosine_schedule",
    "woodbury",
]
