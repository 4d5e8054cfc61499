"""Ready-made optimizers: each one ``chain(...)``."""

from __future__ import annotations

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.per_parameter import check_numbers
from lrkfac.core.base.types import PerParameter
from lrkfac.core.curvature.assignment import Chosen
from lrkfac.core.curvature.factors import dense
from lrkfac.core.curvature.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.curvature.ranks import AutoRank, ranked
from lrkfac.core.curvature.structures import kronecker
from lrkfac.core.layers.description import Layers
from lrkfac.transforms.averaging import ema_params
from lrkfac.transforms.base import GradientTransformation, chain
from lrkfac.transforms.clip import clip_by_kl
from lrkfac.transforms.decay import add_decayed_weights
from lrkfac.transforms.momentum import trace
from lrkfac.transforms.precondition import precondition_by_fisher
from lrkfac.transforms.quadratic_model import scale_by_quadratic_model
from lrkfac.transforms.scaling import scale_by_learning_rate


def low_rank_kfac(
    layers: Layers,
    learning_rate: PerParameter,
    rank: AutoRank = 32,
    damping: float | Tensor = 1e-2,
    decay: float | Tensor = 0.95,
    momentum: PerParameter = 0.9,
    weight_decay: PerParameter = 0.0,
    kl_clip: float = 1e-3,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
) -> GradientTransformation:
    """Natural gradient with low-rank factors, clipping, momentum and decoupled weight decay.

    Args:
        layers: From ``find_layers``.
        learning_rate: A number, a tensor ``[]`` or a schedule; or a tree of them like the parameters, or one that ends
            earlier: ``{"encoder": 0.01, "head": 0.1}``. ``momentum`` and ``weight_decay`` may be trees of numbers, too.
        rank: Rank of the factors; at ``rank ≥ d`` this is ``kfac``. An integer, one for each pattern of layer names, or
            ``"auto"``, see ``precondition_by_fisher``.
        damping: Tikhonov damping, see ``precondition_by_fisher``.
        decay: Decay of the factors' running averages.
        momentum: See ``trace``.
        weight_decay: See ``add_decayed_weights``.
        kl_clip: Bound on the squared length of a step in the Fisher metric, see ``clip_by_kl``. While it binds, it
            sets the length of a step and the learning rate cancels.
        dtype: Of the factors, see ``precondition_by_fisher``.
        differentiable: Whether derivatives through an update go through the statistics, see ``precondition_by_fisher``.

    Raises:
        ValueError: If an argument is out of range.
    """
    both = ranked(layers, rank, lambda r: kronecker(low_rank(r), low_rank_plus_diagonal(r)))
    return _kfac(layers, both, learning_rate, damping, decay, momentum, weight_decay, kl_clip, dtype, differentiable)


def kfac(
    layers: Layers,
    learning_rate: PerParameter,
    damping: float | Tensor = 1e-2,
    decay: float | Tensor = 0.95,
    momentum: PerParameter = 0.9,
    weight_decay: PerParameter = 0.0,
    kl_clip: float = 1e-3,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
) -> GradientTransformation:
    """K-FAC with dense factors, otherwise as ``low_rank_kfac`` (Martens & Grosse 2015, arXiv 1503.05671)."""
    both = kronecker(dense(), dense())
    return _kfac(layers, both, learning_rate, damping, decay, momentum, weight_decay, kl_clip, dtype, differentiable)


def adaptive_low_rank_kfac(
    layers: Layers,
    rank: AutoRank = 32,
    damping: float | Tensor = 0.1,
    decay: float | Tensor = 0.8,
    weight_decay: PerParameter = 0.0,
    dtype: torch.dtype | None = None,
    kl_clip: float | Tensor | None = None,
    gradient_decay: float = 0.6,
) -> GradientTransformation:
    """Natural gradient with low-rank factors and nothing to tune: no learning rate, momentum or damping.

    All three follow in each step from the quadratic model of the batch, see ``scale_by_quadratic_model``. What is
    preconditioned is the sum ``Σ_k gradient_decay^k ∇_{t-k}`` of the last gradients, less noisy than one: the model of
    the batch then says how far to go along a direction that several batches have chosen. Its updates are
    added to the parameters as they are, and ``state[-1].average`` is the running average of the parameters, which is
    often better than the last ones, see ``ema_params``.

    Args:
        layers: From ``find_layers``.
        rank: Rank of the factors; more is better and costs more. See ``low_rank_kfac``.
        damping: Where the dampings start; they soon forget it.
        decay: Decay of the factors' running averages.
        weight_decay: ``η`` of the penalty ``½ η ‖θ‖²``, which enters the model.
        dtype: Of the factors, see ``precondition_by_fisher``.
        kl_clip: Bound on how far one step moves the model; none by default. 1 keeps a run through batches that are
            wrong by orders of magnitude, see ``scale_by_quadratic_model``.
        gradient_decay: Decay of the sum of gradients, in [0, 1); 0 preconditions the batch's own gradient, as in
            Martens & Grosse 2015.

    Raises:
        ValueError: If an argument is out of range.
    """
    # The weights were found on the digits autoencoder; on four other problems of benchmarks/ they are better than
    # 1, too, or make no difference.
    both = ranked(layers, rank, lambda r: kronecker(low_rank(r, weight=2.0), low_rank_plus_diagonal(r, weight=0.5)))
    precondition = precondition_by_fisher(layers, both, decay=decay, dtype=dtype, balanced=True)
    return chain(
        scale_by_quadratic_model(precondition, damping, weight_decay, kl_clip=kl_clip, gradient_decay=gradient_decay),
        ema_params(),
    )


def _kfac(
    layers: Layers,
    structure: Chosen,
    learning_rate: PerParameter,
    damping: float | Tensor,
    decay: float | Tensor,
    momentum: PerParameter,
    weight_decay: PerParameter,
    kl_clip: float,
    dtype: torch.dtype | None,
    differentiable: bool,
) -> GradientTransformation:
    check_numbers(momentum, "momentum", 0, 1)
    check_number(kl_clip, "kl_clip", 0, includes_low=False)
    return chain(
        precondition_by_fisher(
            layers, structure, damping=damping, decay=decay, dtype=dtype, differentiable=differentiable
        ),
        clip_by_kl(kl_clip, learning_rate),
        trace(momentum),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
