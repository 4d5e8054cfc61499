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
from lrkfac.transforms.quadratic_minimum import Form, Minimum, least, shortened


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
        damping: ``λ``.
    """

    evaluation: Evaluation
    params: Tree
    slope: Sequence[Tensor | None]
    total: Rows
    before: Rows
    kept: Tensor
    decay: PerParameter | None
    damping: Tensor

    def minimum(self, gradients: Rows, last: Rows, kl_clip: float | Tensor | None) -> Minimum:
        """Return the minimum over ``α Δ + μ δ₀``, shortened where ``kl_clip`` binds.

        Args:
            gradients: Preconditioned gradients ``-Δ``, ``[k, n]`` each.
            last: ``δ₀``.
            kl_clip: See ``scale_by_quadratic_model``.
        """
        trees = [from_rows(tuple([row[i] for row in gradients]), self.params) for i in range(len(gradients[0]))]
        gram = self.evaluation.gram(*trees, from_rows(last, self.params)).to(self.damping.dtype)
        fisher = Form(gram.diagonal(), -gram[:-1, -1])
        curvature = self._damped(fisher, gradients, last)
        slopes = torch.cat([-self._slopes(gradients), self._slopes(last)[None]])
        minimum = least(curvature, slopes)
        if kl_clip is None:
            return minimum
        return shortened(kl_clip, minimum, fisher, curvature, slopes, products(gradients, self.total))

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

    def _damped(self, fisher: Form, gradients: Rows, last: Rows) -> Form:
        """Return the form of ``F + (λ + η) I``."""
        one = tuple([row[None] for row in last])

        def lengths(weights: Rows | None = None) -> Form:
            squares = torch.cat([weighted_squares(x, weights) for x in (gradients, one)])
            return Form(squares, -products(gradients, last if weights is None else multiplied(last, weights)))

        if self.decay is None or is_number(self.decay):
            return fisher.plus(self.damping + (self.decay or 0.0), lengths())
        each = optree.tree_map(lambda p, one: torch.zeros_like(p) + one, self.params, self.decay)
        return fisher.plus(self.damping, lengths()).plus(1.0, lengths(as_rows(each)))


def _penalty(decay: PerParameter, params: Tree) -> Tensor:
    """Return ``½ η ‖θ‖²``."""
    return 0.5 * decay * vdot(params, params) if is_number(decay) else 0.5 * vdot(params, params, decay)
