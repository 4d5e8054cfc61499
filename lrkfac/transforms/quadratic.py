"""The minimum of a quadratic model along two directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLLINEAR = 1e-4
"""Squared sine of the angle between two directions, in the model's metric, below which only one is used."""


class Minimum(NamedTuple):
    """Where ``½ xᵀ Q x + bᵀ x`` is smallest, ``x = (rate, momentum)``, and its value there; ``[k]`` each."""

    rate: Tensor
    momentum: Tensor
    value: Tensor


def least(curvature: Tensor, slopes: Tensor, rate: float | Tensor | None, momentum: float | Tensor | None) -> Minimum:
    """The minimum for each direction ``i < k``, paired with the last one, the last update.

    ``curvature`` is ``[k + 1, k + 1]``, ``slopes`` ``[k + 1]``. Where the two directions of a pair are nearly one,
    as at the first step, when there was no update yet, the first alone is used.
    """
    diagonal = curvature.reshape(-1)[:: len(curvature) + 1]
    tiny = torch.finfo(curvature.dtype).tiny
    a, c, b = diagonal[:-1], diagonal[-1], curvature[:-1, -1]
    p, q = slopes[:-1], slopes[-1]
    determinant = a * c - b * b
    # Products of smaller numbers are not normal ones, and what is divided by them is anything.
    smallest = tiny / torch.finfo(curvature.dtype).eps
    apart = (determinant > COLLINEAR * (a * c).clamp(min=smallest)) & (c > smallest)
    if momentum is None:
        both = torch.where(apart, determinant, 1.0)
        free = torch.where(apart, (b * p - a * q) / both, 0.0)
        given = torch.where(c > 0, -(q + b * (0.0 if rate is None else rate)) / c.clamp(min=tiny), 0.0)
        speed = free if rate is None else given
    else:
        speed = torch.zeros_like(a) + momentum
    alone = -(p + b * speed) / a.clamp(min=tiny)
    length = torch.where(a > 0, alone, 0.0) if rate is None else torch.zeros_like(a) + rate
    value = 0.5 * (a * length.square() + c * speed.square()) + b * length * speed + p * length + q * speed
    return Minimum(length, speed, value)


def within(
    max_kl: float | Tensor, minimum: Minimum, gram: Tensor, curvature: Tensor, slopes: Tensor, own: Tensor
) -> Minimum:
    """The minimum, shortened, and the model's value there: ``δᵀ F δ`` and ``α² Δᵀ F̂ Δ = -α² gᵀ Δ`` are at most
    ``max_kl``, ``|μ|`` at most 1.

    The batch alone is no judge: where it says nothing, as of layers that are silent in it, any step is short. ``own``
    ``[k]`` is ``gᵀ Δ`` with what ``Δ`` was made of, which may say something there.
    """
    rate, speed, _ = minimum

    def square(matrix: Tensor) -> Tensor:
        own = matrix.diagonal()
        return own[:-1] * rate.square() + 2 * matrix[:-1, -1] * rate * speed + own[-1] * speed.square()

    longest = torch.maximum(square(gram), rate.square() * own.abs())
    share = (max_kl / torch.clamp(longest, min=max_kl)).sqrt() / speed.abs().clamp(min=1)
    linear = slopes[:-1] * rate + slopes[-1] * speed
    return Minimum(share * rate, share * speed, share * linear + 0.5 * share.square() * square(curvature))
