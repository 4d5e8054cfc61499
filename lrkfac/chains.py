"""Ready-made optimizers: each one ``chain(...)``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.per_parameter import check_numbers
from lrkfac.core.base.types import PerParameter
from lrkfac.core.curvature.factors import dense
from lrkfac.core.curvature.low_rank import low_rank, low_rank_plus_diagonal
from lrkfac.core.curvature.ranks import AutoRank, ranked
from lrkfac.core.curvature.structures import ProductStructure, kronecker
from lrkfac.core.layers.description import Layers
from lrkfac.transforms.averaging import ema_params
from lrkfac.transforms.base import GradientTransformation, chain
from lrkfac.transforms.clip import clip_by_kl
from lrkfac.transforms.decay import add_decayed_weights
from lrkfac.transforms.momentum import trace
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


def low_rank_kfac(
    layers: Layers,
    learning_rate: PerParameter,
    rank: AutoRank = 32,
    damping: float | Tensor = 0.03,
    decay: float | Tensor = 0.95,
    momentum: PerParameter = 0.9,
    weight_decay: PerParameter = 0.0,
    kl_clip: float = 1e-3,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    owners: Any = None,
) -> GradientTransformation:
    """Return natural gradient descent with low-rank factors, clipping, momentum and decoupled weight decay.

    Args:
        layers: From ``find_layers``.
        learning_rate: A number, a tensor ``[]`` or a schedule; or a tree of them like the parameters, or one that ends
            earlier: ``{"encoder": 0.01, "head": 0.1}``. ``momentum`` and ``weight_decay`` may be trees of numbers, too.
        rank: Rank of the factors; at ``rank ≥ d`` this is ``kfac``. An integer, one for each pattern of layer names, or
            ``"auto"``, see ``precondition_by_fisher``.
        damping: Tikhonov damping, see ``precondition_by_fisher``.
        decay: Decay of the factors' running averages, in [0, 1).
        momentum: Decay of the sum of updates, in [0, 1), see ``trace``.
        weight_decay: Share of the parameters that is added to the updates, see ``add_decayed_weights``.
        kl_clip: Bound on the squared length of a step in the Fisher metric, see ``clip_by_kl``. While it binds, it
            sets the length of a step and the learning rate cancels.
        dtype: Of the factors, see ``precondition_by_fisher``.
        differentiable: Whether derivatives through an update go through the statistics, see ``precondition_by_fisher``.
        owners: Processes among which layers are divided, see ``precondition_by_fisher``.

    Returns:
        A chain; its ``update`` takes the extra ``evaluation``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = {"w": torch.zeros(3, 4)}, torch.randn(8, 4), torch.randint(3, (8,))
        >>> model = lambda params, x: x @ params["w"].T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
        >>> tx = low_rank_kfac(layers, learning_rate=0.1, rank=2)
        >>> state, before = tx.init(params), evaluate(params, x, y, statistics=False).loss
        >>> for _ in range(5):
        ...     evaluation = evaluate(params, x, y)
        ...     updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        ...     params = lrkfac.apply_updates(params, updates)
        >>> bool(evaluation.loss_at(params) < before)
        True
    """
    structure = ranked(layers, rank, _default_structure)
    precondition = precondition_by_fisher(
        layers, structure, damping=damping, decay=decay, dtype=dtype, differentiable=differentiable, owners=owners
    )
    return _kfac(precondition, learning_rate, momentum, weight_decay, kl_clip)


def kfac(
    layers: Layers,
    learning_rate: PerParameter,
    damping: float | Tensor = 0.03,
    decay: float | Tensor = 0.95,
    momentum: PerParameter = 0.9,
    weight_decay: PerParameter = 0.0,
    kl_clip: float = 1e-3,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    owners: Any = None,
) -> GradientTransformation:
    """Return K-FAC with dense factors (Martens & Grosse 2015, arXiv 1503.05671), otherwise as ``low_rank_kfac``.

    Args:
        layers: From ``find_layers``.
        learning_rate: A number, a tensor ``[]``, a schedule, or a tree of them.
        damping: Tikhonov damping, see ``precondition_by_fisher``.
        decay: Decay of the factors' running averages, in [0, 1).
        momentum: Decay of the sum of updates, in [0, 1), or a tree of numbers; see ``trace``.
        weight_decay: A number ≥ 0, or a tree of numbers; see ``add_decayed_weights``.
        kl_clip: Bound on the squared length of a step in the Fisher metric, see ``clip_by_kl``.
        dtype: Of the factors, see ``precondition_by_fisher``.
        differentiable: Whether derivatives through an update go through the statistics, see ``precondition_by_fisher``.
        owners: Processes among which layers are divided, see ``precondition_by_fisher``.

    Returns:
        A chain; its ``update`` takes the extra ``evaluation``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> params, x = {"w": torch.zeros(3, 4)}, torch.randn(8, 4)
        >>> layers = lrkfac.find_layers(lambda params, x: x @ params["w"].T, params, x)
        >>> len(kfac(layers, learning_rate=0.1).init(params))
        5
    """
    structure = kronecker(dense(), dense())
    precondition = precondition_by_fisher(
        layers, structure, damping=damping, decay=decay, dtype=dtype, differentiable=differentiable, owners=owners
    )
    return _kfac(precondition, learning_rate, momentum, weight_decay, kl_clip)


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
    for small batches and for the full one. Updates are added to the parameters as they are. ``state[-1].average`` is
    the running average of the parameters, which is often better than the last ones, see ``ema_params``.

    Args:
        layers: From ``find_layers``.
        rank: Rank of the factors; more is better and costs more. See ``low_rank_kfac``.
        damping: Start of the dampings; from 1e-4 to 10 it makes little difference after a hundred steps.
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
            layers, but up to four times the memory. By default 129 where ``rank`` is an integer. For ``"auto"`` and a
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


def _default_structure(rank: int) -> ProductStructure:
    return kronecker(low_rank(rank), low_rank_plus_diagonal(rank))


def _adaptive_structure(rank: int, dense_up_to: int) -> ProductStructure:
    return kronecker(
        low_rank(rank, weight=INPUT_RESIDUAL_WEIGHT, dense_up_to=dense_up_to),
        low_rank_plus_diagonal(rank, weight=OUTPUT_DIAGONAL_WEIGHT, dense_up_to=dense_up_to),
    )


def _kfac(
    precondition: GradientTransformation,
    learning_rate: PerParameter,
    momentum: PerParameter,
    weight_decay: PerParameter,
    kl_clip: float,
) -> GradientTransformation:
    check_numbers(momentum, "momentum", 0, 1)
    check_number(kl_clip, "kl_clip", 0, includes_low=False)
    return chain(
        precondition,
        clip_by_kl(kl_clip, learning_rate),
        trace(momentum),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
