"""Low-rank K-FAC as pure functions: natural gradient for functional PyTorch."""

from lrkfac import plot as plot
from lrkfac.chains import adaptive_low_rank_kfac, kfac, low_rank_kfac
from lrkfac.checkpoint import load, save
from lrkfac.core.base.lazy import Unformed
from lrkfac.core.base.trees import formed
from lrkfac.core.curvature.costs import Explanation, explain
from lrkfac.core.curvature.drift import staleness
from lrkfac.core.curvature.exact import full, layer_wise, unit_wise
from lrkfac.core.curvature.factors import dense, diagonal
from lrkfac.core.curvature.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.curvature.schedule import staggered
from lrkfac.core.curvature.structures import kronecker
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.evaluator import fisher
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.discovery import find_layers
from lrkfac.core.layers.module import from_module
from lrkfac.core.layers.statistics import Statistics
from lrkfac.core.likelihoods.bernoulli import bernoulli
from lrkfac.core.likelihoods.categorical import categorical
from lrkfac.core.likelihoods.gaussian import gaussian
from lrkfac.core.likelihoods.joint import joint
from lrkfac.core.likelihoods.poisson import poisson
from lrkfac.core.likelihoods.protocol import Likelihood, Weights
from lrkfac.core.linalg.eigen import power_iteration, subspace_iteration
from lrkfac.core.linalg.inverses import inverse, sherman_morrison, woodbury
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, to_dense
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
