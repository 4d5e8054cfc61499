"""The minimum of a quadratic model along two directions, and a bound on the way to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLLINEAR = 1e-4
"""Squared sine of the angle between two directions, in the model's metric, below which only one is used."""


class Form(NamedTuple):
    """A quadratic form on directions, each of which is paired with the same other one, the last update.

    Attributes:
        squares: Of each direction, ``[k]``.
        mixed: Of each direction with the last update, ``[k]``.
        last: Of the last update, ``[]``, or ``[k]`` where each pair has a form of its own.
    """

    squares: Tensor
    mixed: Tensor
    last: Tensor

    def plus(self, scale: float | Tensor, other: Form) -> Form:
        """Return the form plus a multiple of another, or one for each pair, ``[k]``."""
        if isinstance(scale, Tensor):
            return Form(*[torch.addcmul(x, y, scale) for x, y in zip(self, other, strict=True)])
        return Form(*[torch.add(x, y, alpha=scale) for x, y in zip(self, other, strict=True)])

    def at(self, rate: Tensor, momentum: Tensor) -> Tensor:
        """Return the form of ``rate`` times each direction plus ``momentum`` times the last one, ``[k]``."""
        mixed = 2 * self.mixed * rate * momentum
        return self.squares * rate.square() + mixed + self.last * momentum.square()


class Minimum(NamedTuple):
    """Minimum of ``½ xᵀ Q x + bᵀ x`` over ``x = (rate, momentum)``, its value, and ``bᵀ x`` there; ``[k]`` each."""

    rate: Tensor
    momentum: Tensor
    value: Tensor
    slope: Tensor


def least(curvature: Form, slopes: Tensor) -> Minimum:
    """Return the minimum for each direction ``i < k``, paired with the last direction, the last update.

    Where the two directions of a pair are nearly one, as at the first step, when there was no update yet, the first
    alone is used.

    Args:
        curvature: The quadratic part.
        slopes: ``[k + 1]``.
    """
    tiny = torch.finfo(slopes.dtype).tiny
    a, b, c = curvature
    p, q = slopes[:-1], slopes[-1]
    determinant = a * c - b * b
    # Products of smaller numbers are not normal ones, and what is divided by them is anything.
    smallest = tiny / torch.finfo(slopes.dtype).eps
    apart = (determinant > COLLINEAR * (a * c).clamp(min=smallest)) & (c > smallest)
    momentum = torch.where(apart, (b * p - a * q) / torch.where(apart, determinant, 1.0), 0.0)
    rate = torch.where(a > 0, -(p + b * momentum) / a.clamp(min=tiny), 0.0)
    slope = p * rate + q * momentum
    return Minimum(rate, momentum, 0.5 * curvature.at(rate, momentum) + slope, slope)


def along(weights: tuple[Tensor, Tensor], curvature: Tensor, slope: Tensor) -> tuple[Minimum, Tensor]:
    """Return the minimum over the multiples of one step, which is ``weights`` of each direction, and the multiple.

    Args:
        weights: Of a direction and of the last update, ``[]`` each.
        curvature: Of the step, ``[]``.
        slope: Along the step, ``[]``.
    """
    flat = curvature <= 0  # which NaN is not
    times = torch.where(flat, 0.0, -slope / torch.where(flat, 1.0, curvature))
    value = 0.5 * curvature * times.square() + slope * times
    numbers = times * weights[0], times * weights[1], value, slope * times
    return Minimum(*[x[None] for x in numbers]), times


def shortened(kl_clip: float | Tensor, minimum: Minimum, moved: Tensor, curved: Tensor, decrease: Tensor) -> Minimum:
    """Return the minimum on the way to which ``δᵀ F δ`` and ``α² Δᵀ F̂ Δ = -α² gᵀ Δ`` are at most ``kl_clip``, and
    ``|μ|`` at most 1.

    The batch alone is no judge: where it says nothing, as of layers that are silent in it, any step is short.

    Args:
        kl_clip: The bound.
        minimum: Of each pair of directions, ``[k]``.
        moved: ``δᵀ F δ`` there, ``[k]``.
        curved: ``δᵀ Q δ`` there, with the whole curvature of the model, ``[k]``.
        decrease: ``gᵀ Δ`` with the sum of gradients that ``Δ`` was made of, which may say something where the batch
            says nothing, ``[k]``.
    """
    rate, momentum, _, slope = minimum
    longest = torch.maximum(moved, rate.square() * decrease.abs())
    share = (kl_clip / torch.clamp(longest, min=kl_clip)).sqrt() / momentum.abs().clamp(min=1)
    value = share * slope + 0.5 * share.square() * curved
    return Minimum(share * rate, share * momentum, value, share * slope)
