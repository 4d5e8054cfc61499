"""The minimum of a quadratic model along two directions, and a bound on the way to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLLINEAR = 1e-4
"""Squared sine of the angle between two directions, in the model's metric, below which only one is used."""


class Minimum(NamedTuple):
    """Minimum of ``½ xᵀ Q x + bᵀ x`` over ``x = (rate, momentum)``, and its value; ``[k]`` each."""

    rate: Tensor
    momentum: Tensor
    value: Tensor


def least(curvature: Tensor, slopes: Tensor) -> Minimum:
    """Return the minimum for each direction ``i < k``, paired with the last direction, the last update.

    Where the two directions of a pair are nearly one, as at the first step, when there was no update yet, the first
    alone is used.

    Args:
        curvature: ``[k + 1, k + 1]``.
        slopes: ``[k + 1]``.
    """
    diagonal = curvature.reshape(-1)[:: len(curvature) + 1]
    tiny = torch.finfo(curvature.dtype).tiny
    a, c, b = diagonal[:-1], diagonal[-1], curvature[:-1, -1]
    p, q = slopes[:-1], slopes[-1]
    determinant = a * c - b * b
    # Products of smaller numbers are not normal ones, and what is divided by them is anything.
    smallest = tiny / torch.finfo(curvature.dtype).eps
    apart = (determinant > COLLINEAR * (a * c).clamp(min=smallest)) & (c > smallest)
    momentum = torch.where(apart, (b * p - a * q) / torch.where(apart, determinant, 1.0), 0.0)
    rate = torch.where(a > 0, -(p + b * momentum) / a.clamp(min=tiny), 0.0)
    value = 0.5 * (a * rate.square() + c * momentum.square()) + b * rate * momentum + p * rate + q * momentum
    return Minimum(rate, momentum, value)


def shortened(
    kl_clip: float | Tensor, minimum: Minimum, gram: Tensor, curvature: Tensor, slopes: Tensor, decrease: Tensor
) -> Minimum:
    """Return the minimum on the way to which ``δᵀ F δ`` and ``α² Δᵀ F̂ Δ = -α² gᵀ Δ`` are at most ``kl_clip``, and
    ``|μ|`` at most 1.

    The batch alone is no judge: where it says nothing, as of layers that are silent in it, any step is short.
    ``decrease`` ``[k]`` is ``gᵀ Δ`` with the sum of gradients that ``Δ`` was made of, which may say something there.
    """
    rate, momentum, _ = minimum

    def square(matrix: Tensor) -> Tensor:
        diagonal = matrix.diagonal()
        mixed = 2 * matrix[:-1, -1] * rate * momentum
        return diagonal[:-1] * rate.square() + mixed + diagonal[-1] * momentum.square()

    longest = torch.maximum(square(gram), rate.square() * decrease.abs())
    share = (kl_clip / torch.clamp(longest, min=kl_clip)).sqrt() / momentum.abs().clamp(min=1)
    linear = slopes[:-1] * rate + slopes[-1] * momentum
    return Minimum(share * rate, share * momentum, share * linear + 0.5 * share.square() * square(curvature))
