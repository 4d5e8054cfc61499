"""The quadratic model of one batch's loss around the current parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from lrkfac.core.base.packing import Rows, as_rows, from_rows, multiplied, products, weighted_squares
from lrkfac.core.base.per_parameter import is_number
from lrkfac.core.base.trees import vdot
from lrkfac.core.base.types import PerParameter, Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import apply_updates
from lrkfac.transforms.quadratic_minimum import Form, Minimum, along, least, shortened


@dataclass(frozen=True, eq=False)
class BatchModel:
    """``M(δ) = ∇hᵀδ + ½ δᵀ(F + (λ + η) I)δ`` with ``h = loss + ½ η ‖θ‖²`` of a batch.

    Attributes:
        evaluation: Of the batch.
        params: Where.
        slope: ``∇h``; ``None`` in the place of rows whose memory the sum of gradients has taken.
        total: The sum of the gradients ``∇h`` of this batch and those before.
        before: That of those before.
        kept: Their decay: ``total = ∇h + kept before``.
        decay: ``η``, a number or one for each leaf; ``None`` for 0.
        damping: ``λ`` for each pair of directions, ``[k]``.
    """

    evaluation: Evaluation
    params: Tree
    slope: Sequence[Tensor | None]
    total: Rows
    before: Rows
    kept: Tensor
    decay: PerParameter | None
    damping: Tensor

    def minimum(self, gradients: Rows, last: Rows, kl_clip: float | Tensor | None) -> tuple[Minimum, Tensor]:
        """Return the minimum over ``α Δ + μ δ₀``, shortened where ``kl_clip`` binds, and ``δ₀``'s slope where it began.

        That is its slope now, at its end, less the curvature along it.

        Args:
            gradients: Preconditioned gradients ``-Δ``, ``[k, n]`` each.
            last: ``δ₀``.
            kl_clip: See ``scale_by_quadratic_model``.
        """
        trees = [from_rows(tuple([row[i] for row in gradients]), self.params) for i in range(len(gradients[0]))]
        gram = self.evaluation.gram(*trees, from_rows(last, self.params)).to(self.damping.dtype)
        fisher = Form(gram.diagonal()[:-1], -gram[:-1, -1], gram[-1, -1])
        curvature, damped = self._forms(fisher, gradients, last)
        slopes = torch.cat([-self._slopes(gradients), self._slopes(last)[None]])
        minimum = least(damped, slopes)
        if kl_clip is not None:
            moved, curved = (form.at(minimum.rate, minimum.momentum) for form in (fisher, damped))
            minimum = shortened(kl_clip, minimum, moved, curved, products(gradients, self.total))
        return minimum, slopes[-1] - curvature.last

    def minimum_along(
        self, gradients: Rows, last: Rows, weights: tuple[Tensor, Tensor], kl_clip: float | Tensor | None
    ) -> Minimum:
        """Return the minimum over multiples of one step in the span of ``Δ`` and ``δ₀``, by one forward derivative.

        Args:
            gradients: The preconditioned gradient ``-Δ``, ``[1, n]`` each.
            last: ``δ₀``.
            weights: Of ``Δ`` and ``δ₀`` in the step, ``[]`` each.
            kl_clip: See ``scale_by_quadratic_model``.
        """
        # What is not finite stays so: then no step is taken.
        step = tuple(
            [
                torch.addcmul(weights[1].to(y.dtype) * y, x[0], -weights[0].to(y.dtype))
                for x, y in zip(gradients, last, strict=True)
            ]
        )
        tangents = optree.tree_map(lambda x: x[None], from_rows(step, self.params))
        fisher = self.evaluation.gram(tangents)[0, 0].to(self.damping.dtype)
        curvature = fisher + self._lengths(step)
        minimum, times = along(weights, curvature, self._slopes(step))
        if kl_clip is not None:
            moved, curved = ((times.square() * x)[None] for x in (fisher, curvature))
            minimum = shortened(kl_clip, minimum, moved, curved, products(gradients, self.total))
        return minimum

    def change(self, step: Tree) -> tuple[Tensor, Tensor]:
        """Return ``h`` before and after a step."""
        moved = apply_updates(self.params, step)
        before, after = self.evaluation.loss, self.evaluation.loss_at(moved)
        if self.decay is None:
            return before, after
        return before + _penalty(self.decay, self.params), after + _penalty(self.decay, moved)

    def _slopes(self, rows: Rows) -> Tensor:
        """Return the inner products of stacked rows, or of rows, with the gradient."""
        parts = [
            x @ total - self.kept * (x @ before) if slope is None else x @ slope
            for x, slope, total, before in zip(rows, self.slope, self.total, self.before, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def _lengths(self, step: Rows) -> Tensor:
        """Return ``δᵀ (λ + η) δ``."""
        square, damping = products(step, step), self.damping[0]
        if self.decay is None:
            return damping * square
        if is_number(self.decay):
            return (damping + self.decay) * square
        return damping * square + products(step, multiplied(step, self._decays()))

    def _decays(self) -> Rows:
        """Return ``η`` of each parameter."""
        return as_rows(optree.tree_map(lambda p, one: torch.zeros_like(p) + one, self.params, self.decay))

    def _forms(self, fisher: Form, gradients: Rows, last: Rows) -> tuple[Form, Form]:
        """Return the forms of ``F + η I`` and ``F + (λ + η) I``."""

        def lengths(weights: Rows | None = None) -> Form:
            weighted = last if weights is None else multiplied(last, weights)
            return Form(weighted_squares(gradients, weights), -products(gradients, weighted), products(last, weighted))

        plain = lengths()
        if self.decay is None:
            return fisher, fisher.plus(self.damping, plain)
        if is_number(self.decay):
            return fisher.plus(self.decay, plain), fisher.plus(self.damping + self.decay, plain)
        penalized = fisher.plus(1.0, lengths(self._decays()))
        return penalized, penalized.plus(self.damping, plain)


def _penalty(decay: PerParameter, params: Tree) -> Tensor:
    """Return ``½ η ‖θ‖²``."""
    return 0.5 * decay * vdot(params, params) if is_number(decay) else 0.5 * vdot(params, params, decay)
