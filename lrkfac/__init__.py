"""Low-rank K-FAC as pure functions: natural gradient for functional PyTorch."""

from lrkfac import checkpoint as checkpoint
from lrkfac import curvature as curvature
from lrkfac import linalg as linalg
from lrkfac import plot as plot
from lrkfac import schedules as schedules
from lrkfac import structures as structures
from lrkfac.chains import kfac, low_rank_kfac
from lrkfac.core.base.gathering import unshard
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.replicas import check_replicas
from lrkfac.core.base.trees import materialize
from lrkfac.core.curvature.costs import explain
from lrkfac.core.curvature.drift import factor_drift
from lrkfac.core.curvature.schedule import round_robin_refresh
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.evaluator import evaluator
from lrkfac.core.evaluation.merging import merge_evaluations
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.derivatives import derivatives, laplacian
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
from lrkfac.diagnostics import diagnose, ranks_by_trace
from lrkfac.optim import LowRankKFAC
from lrkfac.transforms.accumulation import accumulate
from lrkfac.transforms.adam import scale_by_adam
from lrkfac.transforms.averaging import ema_params
from lrkfac.transforms.base import GradientTransformation, apply_updates, chain, identity
from lrkfac.transforms.clip import clip, clip_by_global_norm, clip_by_kl
from lrkfac.transforms.decay import add_decayed_weights
from lrkfac.transforms.hyperparameters import inject_hyperparams
from lrkfac.transforms.masking import masked, partition
from lrkfac.transforms.momentum import trace
from lrkfac.transforms.orthogonalize import orthogonalize_by_fisher
from lrkfac.transforms.precondition import precondition_by_fisher
from lrkfac.transforms.quadratic_model import scale_by_quadratic_model
from lrkfac.transforms.quadratic_options import QuadraticModelOptions
from lrkfac.transforms.robust import apply_if_finite
from lrkfac.transforms.sample_space import precondition_in_sample_space
from lrkfac.transforms.scaling import scale, scale_by_learning_rate
from lrkfac.transforms.slope_and_curvature import scale_by_slope_and_curvature
from lrkfac.untuned_chains import adaptive_low_rank_kfac, spectral_kfac
from lrkfac.version import __version__ as __version__

__all__ = [
    "Evaluation",
    "GradientTransformation",
    "Layer",
    "LayerKind",
    "Layers",
    "LazyMatrix",
    "Likelihood",
    "LowRankKFAC",
    "QuadraticModelOptions",
    "Statistics",
    "Weights",
    "accumulate",
    "adaptive_low_rank_kfac",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "bernoulli",
    "categorical",
    "chain",
    "check_replicas",
    "clip",
    "clip_by_global_norm",
    "clip_by_kl",
    "derivatives",
    "diagnose",
    "ema_params",
    "evaluator",
    "explain",
    "factor_drift",
    "find_layers",
    "from_module",
    "gaussian",
    "identity",
    "inject_hyperparams",
    "joint",
    "kfac",
    "laplacian",
    "low_rank_kfac",
    "masked",
    "materialize",
    "merge_evaluations",
    "orthogonalize_by_fisher",
    "partition",
    "poisson",
    "precondition_by_fisher",
    "precondition_in_sample_space",
    "ranks_by_trace",
    "round_robin_refresh",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_quadratic_model",
    "scale_by_slope_and_curvature",
    "spectral_kfac",
    "trace",
    "unshard",
]
