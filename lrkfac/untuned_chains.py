"""Ready-made optimizers with nothing to tune; one of them also takes a learning rate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.types import PerParameter
from lrkfac.core.curvature.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.curvature.ranks import AutoRank, ranked
from lrkfac.core.curvature.structures import ProductStructure, kronecker
from lrkfac.core.layers.description import Layers
from lrkfac.transforms.averaging import ema_params
from lrkfac.transforms.base import GradientTransformation, chain
from lrkfac.transforms.decay import add_decayed_weights
from lrkfac.transforms.orthogonalize import orthogonalize_by_fisher
from lrkfac.transforms.precondition import precondition_by_fisher
from lrkfac.transforms.quadratic_model import DEFAULTS, scale_by_quadratic_model
from lrkfac.transforms.quadratic_options import QuadraticModelOptions
from lrkfac.transforms.robust import apply_if_finite
from lrkfac.transforms.scaling import scale_by_learning_rate
from lrkfac.transforms.slope_and_curvature import scale_by_slope_and_curvature

INPUT_RESIDUAL_WEIGHT = 2.0
"""Weight of the trace that the input factor's eigenpairs miss, in the adaptive chain.

Among the missed directions, the ones next to the kept matter most, and their eigenvalues lie above the mean. Chosen on
the digits autoencoder; on four other problems of ``benchmarks`` it beats 1 or makes no difference.
"""
OUTPUT_DIAGONAL_WEIGHT = 0.5
"""Weight of the diagonal that the output factor's eigenpairs miss, in the adaptive chain; chosen likewise."""

PATIENCE = 1000
"""Batches in a row that are not finite, after which a chain without a learning rate lets them through."""
NARROW = 129
"""Dimension up to which the adaptive chain holds factors densely: 128 inputs and a bias.

Beyond the kept ones, eigenvalues of an input factor fall by orders of magnitude, and one number for all of them costs
0.13 to 0.2 nats on networks of width 64 and 128. Up to here a Cholesky factor takes as long as a step of subspace
iteration; ``benchmarks/README.md`` has both.
"""


def adaptive_low_rank_kfac(
    layers: Layers,
    rank: AutoRank = 32,
    damping: float | Tensor = 0.1,
    decay: float | Tensor = 0.8,
    weight_decay: PerParameter = 0.0,
    dtype: torch.dtype | None = None,
    kl_clip: float | Tensor | None = None,
    gradient_decay: float | None = None,
    owners: Any = None,
    options: QuadraticModelOptions = DEFAULTS,
    dense_up_to: int | None = None,
) -> GradientTransformation:
    """Return natural gradient descent with low-rank factors and nothing to tune.

    Learning rate, momentum and damping follow in each step from the quadratic model of the batch, see
    ``scale_by_quadratic_model``. The preconditioned direction is that of ``Σ_k gradient_decay^k ∇_{t-k}``, the sum of
    the last gradients, which is less noisy than one: the model of the batch then says how far to go along a direction
    that several batches have chosen. How far back the sum reaches follows from the noise, so that the same chain is
    for small batches and for the full one. Updates are added to the parameters unchanged. ``state[-1].average`` is
    the running average of the parameters, which is often better than the last ones, see ``ema_params``.

    Args:
        layers: From ``find_layers``.
        rank: Rank of the factors; more is better and costs more. See ``low_rank_kfac``.
        damping: Start of the dampings, which find their place within some steps with statistics.
        decay: Decay of the factors' running averages, in [0, 1).
        weight_decay: ``η`` of the penalty ``½ η ‖θ‖²``, which enters the model.
        dtype: Of the factors, see ``precondition_by_fisher``.
        kl_clip: Bound on how far one step moves the model, see ``clip_by_kl``; none by default. 1 keeps a run through
            batches that are wrong by orders of magnitude, see ``scale_by_quadratic_model``.
        gradient_decay: Decay of the sum of gradients, in [0, 1); 0 preconditions the batch's own gradient, as in
            Martens & Grosse 2015. ``None`` takes the share of noise in the slope of the last steps, 0 where all batches
            are equal.
        owners: Processes among which layers are divided, see ``precondition_by_fisher``.
        options: How the dampings adapt and which steps are undone, see ``QuadraticModelOptions``.
        dense_up_to: Dimension up to which a factor is held densely, which is exact and takes no longer for narrow
            layers, but several times the memory. By default 129 where ``rank`` is an integer. For ``"auto"`` and a
            mapping, which may come from a budget of memory, it is 0: only what is no larger than low rank is dense.

    Returns:
        A chain; its ``update`` takes the extra ``evaluation``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = {"w": torch.zeros(1, 4)}, torch.randn(8, 4), torch.randn(8, 1)
        >>> model = lambda params, x: x @ params["w"].T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate, tx = lrkfac.evaluator(model, lrkfac.gaussian(), layers), adaptive_low_rank_kfac(layers)
        >>> state, before = tx.init(params), evaluate(params, x, y, statistics=False).loss
        >>> for _ in range(5):
        ...     evaluation = evaluate(params, x, y)
        ...     updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        ...     params = lrkfac.apply_updates(params, updates)
        >>> bool(evaluation.loss_at(params) < before)
        True
    """
    if dense_up_to is None:
        dense_up_to = NARROW if isinstance(rank, int) else 0
    structure = ranked(layers, rank, partial(_adaptive_structure, dense_up_to=dense_up_to))
    precondition = precondition_by_fisher(layers, structure, decay=decay, dtype=dtype, balanced=True, owners=owners)
    return chain(
        scale_by_quadratic_model(precondition, damping, weight_decay, kl_clip, gradient_decay, options),
        ema_params(),
    )


def spectral_kfac(
    layers: Layers,
    learning_rate: PerParameter | None = None,
    rank: AutoRank = 16,
    power: float = 0.25,
    momentum: float | Tensor = 0.95,
    decay: float | Tensor = 0.8,
    damping: float | Tensor = 1e-3,
    weight_decay: PerParameter = 0.0,
    fallback: GradientTransformation | None = None,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Return steepest descent in the spectral norm of the Fisher metric, with decoupled weight decay.

    Muon with low-rank Fisher factors, see ``orthogonalize_by_fisher``: each matrix takes a step whose root mean square
    is the learning rate. Without one, the next batch finds it, see ``scale_by_slope_and_curvature``: there is nothing
    to tune, and ``state[-1].average`` are the parameters to be read, see ``ema_params``.

    Args:
        layers: From ``find_layers``.
        learning_rate: A number, a tensor ``[]`` or a schedule, best one that falls to 0; or a tree of them. ``None``
            for none to choose.
        rank: Rank of the factors, see ``orthogonalize_by_fisher``.
        power: Power of the factors, from 0, which is Muon, to 1.
        momentum: Decay of the average of gradients, in [0, 1).
        decay: Decay of the factors' running averages, in [0, 1).
        damping: Share of a factor's mean eigenvalue that is added to it.
        fallback: Of all parameters but matrices, see ``orthogonalize_by_fisher``.
        dtype: Of the factors, see ``precondition_by_fisher``.
        weight_decay: A number ≥ 0, or a tree of numbers; see ``add_decayed_weights``.

    Returns:
        A chain; its ``update`` takes the extra ``evaluation``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = {"w": torch.zeros(3, 4)}, torch.randn(8, 4), torch.randint(3, (8,))
        >>> layers = lrkfac.find_layers(model := lambda p, x: x @ p["w"].T, params, x)
        >>> evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), spectral_kfac(layers)
        >>> state, before = tx.init(params), evaluate(params, x, y, statistics=False).loss
        >>> for _ in range(5):
        ...     evaluation = evaluate(params, x, y)
        ...     updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        ...     params = lrkfac.apply_updates(params, updates)
        >>> bool(evaluation.loss_at(params) < before)
        True
    """
    direction = orthogonalize_by_fisher(
        layers, rank, power, momentum=momentum, decay=decay, damping=damping, fallback=fallback, dtype=dtype
    )
    if learning_rate is not None:
        return chain(direction, add_decayed_weights(weight_decay), scale_by_learning_rate(learning_rate))
    return chain(
        apply_if_finite(direction, PATIENCE),
        add_decayed_weights(weight_decay),
        scale_by_slope_and_curvature(),
        ema_params(),
    )


def _adaptive_structure(rank: int, dense_up_to: int) -> ProductStructure:
    return kronecker(
        low_rank(rank, weight=INPUT_RESIDUAL_WEIGHT, dense_up_to=dense_up_to),
        low_rank_plus_diagonal(rank, weight=OUTPUT_DIAGONAL_WEIGHT, dense_up_to=dense_up_to),
    )
