"""Ready-made optimizers: each one ``chain(...)``."""

from __future__ import annotations

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
from lrkfac.transforms.base import GradientTransformation, chain
from lrkfac.transforms.clip import clip_by_kl
from lrkfac.transforms.decay import add_decayed_weights
from lrkfac.transforms.momentum import trace
from lrkfac.transforms.precondition import precondition_by_fisher
from lrkfac.transforms.scaling import scale_by_learning_rate


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
        kl_clip: Bound on the squared length of a step in the Fisher metric, before momentum, see ``clip_by_kl``. While
            it is active, changing the learning rate has no effect.
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
        kl_clip: Bound on the squared length of a step in the Fisher metric, before momentum, see ``clip_by_kl``.
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


def _default_structure(rank: int) -> ProductStructure:
    return kronecker(low_rank(rank), low_rank_plus_diagonal(rank))


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
