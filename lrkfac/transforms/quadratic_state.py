"""What the quadratic model remembers from step to step, and how much of a batch's slope it takes for noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.packing import Rows

MEMORY = 0.9
"""Decay of the sums by which the noise of gradients is found."""
LARGEST_DECAY = 0.75
"""Bound of a decay of gradients that is found.

With batches of 16 of the digits autoencoder, where the share of noise is 0.9, longer sums are worse.
"""


class Chosen(NamedTuple):
    """The choice of a batch's model; tensors ``[]``.

    Attributes:
        rate: ``α``.
        momentum: ``μ``.
        value: Of the model, at most 0.
        slope: ``∇hᵀδ``.
        factor_damping: ``γ``.
        damping: ``λ``.
    """

    rate: Tensor
    momentum: Tensor
    value: Tensor
    slope: Tensor
    factor_damping: Tensor
    damping: Tensor


class GradientNoise(NamedTuple):
    """The share of a batch's slope along its own step that is the batch's noise; tensors ``[]``.

    A step is made of its batch's gradient, so that this batch's slope along it is steeper than that of others. The next
    batch is a fair judge: its slope after the step, less its curvature along the step, is its slope where the step
    began.

    Attributes:
        slope: ``∇hᵀδ`` of the last step on its own batch, at most 0; 0 where it was undone.
        missed: By how much the model misses the slope of its own batch after a step, as a share of the slope before, at
            the last statistics.
        unseen: Decaying sum of what the next batches do not see of the slopes of the steps' own batches.
        slopes: Decaying sum of the slopes of the steps' own batches.
    """

    slope: Tensor
    missed: Tensor
    unseen: Tensor
    slopes: Tensor

    def compared(self, fair: Tensor) -> GradientNoise:
        """Return the sums with the next batch's slope where the last step began."""
        expected = torch.addcmul(self.slope, self.missed, self.slope, value=-1)
        unseen = expected - fair * (self.slope < 0)
        return self._replace(
            unseen=torch.add(unseen, self.unseen, alpha=MEMORY), slopes=torch.add(self.slope, self.slopes, alpha=MEMORY)
        )

    def stepped(self, chosen: Chosen, accepted: Tensor) -> GradientNoise:
        """Return the sums after a step."""
        return self._replace(slope=torch.where(accepted, chosen.slope, 0))

    def judged(self, chosen: Chosen, squares: Tensor, change: Tensor, accepted: Tensor) -> GradientNoise:
        """Return the sums where the change of the loss after a step ``δ`` with ``δᵀδ = squares`` is known.

        The loss and the model without damping are taken for parabolas along the step, of one slope. Their slopes at its
        end then differ by twice what their values do.
        """
        undamped = chosen.value - 0.5 * chosen.damping * squares
        missed = 2 * (undamped - change) / chosen.slope.clamp(max=-torch.finfo(change.dtype).tiny)
        return self._replace(missed=torch.where(accepted, missed.clamp(-1, 1), self.missed))

    def share(self) -> Tensor:
        """Return the share, in [0, ``LARGEST_DECAY``]; 0 before anything is known."""
        return (self.unseen / self.slopes.clamp(max=-torch.finfo(self.slopes.dtype).tiny)).clamp(0, LARGEST_DECAY)


class QuadraticModelState(NamedTuple):
    """State of ``scale_by_quadratic_model``; tensors ``[]`` but for the first three and ``noise``.

    Attributes:
        preconditioner: State of the preconditioner.
        last: Last update, a tuple of rows: one of all parameters with fewer than 65536 entries, one for each other.
        total: Decaying sum of the gradients, in such rows.
        damping: ``λ`` of the quadratic model.
        factor_damping: ``γ`` of the preconditioner, the product of the two factors' dampings.
        gradient_decay: Decay of the sum of the gradients in the last step.
        since: Steps since the last statistics; int64.
        refreshes: Number of steps with statistics; int64.
        learning_rate: ``α`` of the last step.
        momentum: ``μ`` of the last step.
        predicted: Change of the loss that the model predicted for the last step, at most 0.
        reduction_ratio: Change of the loss that came about, over the predicted one, in the last step with statistics.
        rejected: Number of steps that were undone; int64.
        failures: Number of the last evaluations in a row that were not finite; int64.
        noise: Of the gradients, from which the decay of their sum follows.
    """

    preconditioner: Any
    last: Rows
    total: Rows
    damping: Tensor
    factor_damping: Tensor
    gradient_decay: Tensor
    since: Tensor
    refreshes: Tensor
    learning_rate: Tensor
    momentum: Tensor
    predicted: Tensor
    reduction_ratio: Tensor
    rejected: Tensor
    failures: Tensor
    noise: GradientNoise


def weights(state: QuadraticModelState) -> tuple[Tensor, Tensor]:
    """Return the proportion of direction and last update in the last step, the larger of size 1; before the first, 1
    and 0.
    """
    larger = torch.maximum(state.learning_rate.abs(), state.momentum.abs())
    known = larger > 0
    unit = torch.where(known, larger, 1.0)
    return torch.where(known, state.learning_rate / unit, 1.0), state.momentum / unit
