"""Steepest descent in the spectral norm of the Fisher metric."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_integer, check_number
from lrkfac.core.base.leaves import tree_structure, tree_unflatten
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import materialize, zeros_like
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.low_rank import low_rank
from lrkfac.core.curvature.ranks import AutoRank, ranked
from lrkfac.core.curvature.spectral import SpectralStructure, matrix_layers
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.linalg.polar import ITERATIONS
from lrkfac.transforms.adam import scale_by_adam
from lrkfac.transforms.base import GradientTransformation, chain, check_evaluation, check_state, transformation
from lrkfac.transforms.momentum import TraceState, trace
from lrkfac.transforms.precondition import precondition_by_fisher
from lrkfac.transforms.precondition_state import PreconditionState
from lrkfac.transforms.scaling import scale

FALLBACK_SCALE = 0.75
"""Share of Adam's step that other parameters take, where each matrix takes a step of root mean square 1."""


class OrthogonalizeState(NamedTuple):
    """State of ``orthogonalize_by_fisher``.

    Attributes:
        preconditioner: Of the factors and the fallback; its ``inverses`` are the powers ``(B + δ_B)^-p`` and
            ``(A + δ_A)^-p``.
        momentum: The decaying sum of the gradients of each orthogonalized parameter, in their order.
    """

    preconditioner: PreconditionState
    momentum: tuple[Tensor, ...]


def orthogonalize_by_fisher(
    layers: Layers,
    rank: AutoRank = 16,
    power: float = 0.25,
    momentum: float | Tensor = 0.95,
    decay: float | Tensor = 0.8,
    damping: float | Tensor = 1e-3,
    fallback: GradientTransformation | None = None,
    normalized: bool = True,
    iterations: int | None = ITERATIONS,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Replace each layer's gradient by the steepest direction in the spectral norm of the Fisher metric.

    With the average ``M`` of a layer's gradients, its Fisher factors ``A`` and ``B`` at a low rank, and ``p = power``::

        W = (B + δ_B)^-p M (A + δ_A)^-p
        D = (B + δ_B)^-p polar(W) √max(d_in, d_out) (A + δ_A)^-p

    Of all ``D`` with ``‖(B + δ_B)^p D (A + δ_A)^p‖₂ ≤ √max(d_in, d_out)`` it has the largest ``⟨M, D⟩``. At ``p = 0``
    it is Muon's direction (Jordan et al. 2024); at ``p = 1/2`` and without damping it does not depend on the bases in
    which inputs and outputs of a layer are written. A joint bias is one more column of the matrix. ``M`` looks one
    step ahead, as Nesterov's: ``m ← μ m + (1 - μ) g``, then ``M = μ m + (1 - μ) g``.

    Each ``D``, with the column of a joint bias, is then scaled to root mean square 1: the learning rate is the root
    mean square of a step, as about that of Adam is. Before the first statistics ``A`` and ``B`` are the identity.

    Args:
        layers: From ``find_layers``. Embeddings, scales, shifts and separate biases take ``fallback``, as parameters do
            that no layer covers.
        rank: Rank of both factors; the rest of each is a multiple of the identity. An integer, one for each pattern of
            layer names, or ``"auto"``, see ``precondition_by_fisher``.
        power: ``p``, from 0 to 1.
        momentum: ``μ``, in [0, 1).
        decay: Decay of the running averages of the factors per batch of statistics, in [0, 1).
        damping: ``δ`` of each factor as a share of its mean eigenvalue, positive.
        fallback: Transformation of all other parameters; by default 0.75 of Adam's step,
            ``chain(scale_by_adam(), scale(0.75))``.
        normalized: Whether to scale to root mean square 1; else ``D`` is as above.
        iterations: Of the polar factor, see ``linalg.polar``; ``None`` finds it exactly, by singular vectors.
        dtype: Of the factors and their powers, float32 or float64, see ``precondition_by_fisher``.

    Returns:
        A transformation with an ``OrthogonalizeState``. Its ``update`` takes the extra ``evaluation``.

    Raises:
        ValueError: If an argument is out of range; in ``update``, if the tree, the state or the statistics are not
            those of ``layers``.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = torch.eye(3), torch.randn(8, 3), torch.randint(3, (8,))
        >>> model = lambda p, x: x @ p.T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> tx = lrkfac.orthogonalize_by_fisher(layers)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, x, y)
        >>> updates, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> round(updates.square().mean().item(), 3)
        1.0
    """
    check_layers(layers)
    check_number(momentum, "momentum", 0, 1)
    check_power(power)
    check_flag(normalized, "normalized")
    if iterations is not None:
        check_integer(iterations, "iterations")
    matrices = matrix_layers(layers)
    structure = ranked(matrices, rank, partial(_structure, float(power), iterations, normalized))
    if fallback is None and matrices.uncovered:  # without any, a counter would be on no device
        fallback = chain(scale_by_adam(), scale(FALLBACK_SCALE))
    inner = precondition_by_fisher(matrices, structure, damping=damping, decay=decay, fallback=fallback, dtype=dtype)
    return transformation(Orthogonalize(matrices, inner, trace(momentum, nesterov=True)))


def _structure(power: float, iterations: int | None, normalized: bool, rank: int) -> SpectralStructure:
    factor = low_rank(rank)
    return SpectralStructure(factor, factor, power=power, iterations=iterations, normalized=normalized)


def check_power(power: Any) -> None:
    """Raise unless an exponent is a number from 0 to 1."""
    if isinstance(power, Tensor):  # it is part of the structure, which is compared and hashed
        raise TypeError("power: expected a number, got a tensor")
    check_number(power, "power", 0)
    if power > 1:
        raise ValueError(f"power: expected a number from 0 to 1, got {power}")


@dataclass(frozen=True, eq=False)
class Orthogonalize:
    """See ``orthogonalize_by_fisher``.

    Attributes:
        layers: Those that are orthogonalized.
        inner: Preconditions the average of their gradients.
        momentum: Makes that average, but for its scale.
    """

    layers: Layers
    inner: GradientTransformation
    momentum: GradientTransformation

    def init(self, params: Tree) -> OrthogonalizeState:
        """Return the state before the first statistics, with which directions are Muon's."""
        leaves = check_like(self.layers.tree, params, "params")
        covered = [leaves[i] for i in self._covered]
        return OrthogonalizeState(self.inner.init(params), tuple(zeros_like(covered)))

    def update(
        self,
        updates: Tree,
        state: OrthogonalizeState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        factor_damping: float | Tensor | None = None,
        **extra: Any,
    ) -> tuple[Tree, OrthogonalizeState]:
        """Return the directions, after a refresh of the factors where the evaluation has statistics.

        ``factor_damping``, by which a quadratic model damps in the unit of the Fisher matrix, stays out: the damping
        here is a share.
        """
        evaluation = check_evaluation(evaluation, "orthogonalize_by_fisher")
        check_state(state, OrthogonalizeState)
        leaves: list[Any] = list(check_like(self.layers.tree, updates, "updates"))
        gradients = materialize([leaves[i] for i in self._covered])
        check_like(list(state.momentum), gradients, "orthogonalize_by_fisher: updates")
        # A sum, not an average: the direction does not depend on the scale.
        ahead, new = self.momentum.update(gradients, TraceState(list(state.momentum)))
        for i, leaf in zip(self._covered, ahead, strict=True):
            leaves[i] = leaf
        averaged = tree_unflatten(tree_structure(updates), leaves)
        directions, inner = self.inner.update(averaged, state.preconditioner, params, evaluation=evaluation, **extra)
        return directions, OrthogonalizeState(inner, tuple(new.trace))

    @property
    def _covered(self) -> list[int]:
        return sorted(self.layers.covered)
