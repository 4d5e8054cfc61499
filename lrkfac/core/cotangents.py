"""What is taken back from the outputs to the layers: made a few at a time, never all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad, vmap

from lrkfac.core.likelihoods import Likelihood
from lrkfac.core.tree import wide
from lrkfac.core.types import Tree

COLUMNS = 16
"""Columns of the output Hessian's square root that the exact estimator takes back at once."""

NUMBERS = 2**22
"""Outputs for which targets are drawn at once: what that takes beside the cotangent itself."""


def sampled_cotangents(
    likelihood: Likelihood,
    outputs: Tensor,
    transpose: Callable[[Tensor], Tree],
    samples: int,
    noise: Tensor | None,
) -> Any:
    """``transpose`` of the gradients of the terms at targets drawn from the model, ``[samples, ...]``.

    Raises:
        ValueError: If ``noise`` is not ``[samples, *outputs.shape]``.
    """
    shape = (samples, *outputs.shape)
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"noise: expected uniform numbers of shape {shape}, got {tuple(noise.shape)}")
    draws = [None] * samples if noise is None else noise.unbind()
    parts = [transpose(sampled_cotangent(likelihood, outputs, u)) for u in draws]
    return optree.tree_map(lambda *g: g[0][None] if samples == 1 else torch.stack(g), *parts)


def sampled_cotangent(likelihood: Likelihood, outputs: Tensor, noise: Tensor | None) -> Tensor:
    """One of them, of the shape of ``outputs``."""

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.negative_log_likelihood(outputs, targets).sum()

    def part(outputs: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            noise = torch.rand(outputs.shape, dtype=wide(outputs).dtype, device=outputs.device)
        return grad(total)(outputs, likelihood.sample(outputs, noise))

    at_once = max(NUMBERS * outputs.shape[0] // outputs.numel(), 1)
    parts = outputs.split(at_once)
    draws = [None] * len(parts) if noise is None else noise.split(at_once)
    return torch.cat([part(o, u) for o, u in zip(parts, draws, strict=True)])


def exact_cotangents(likelihood: Likelihood, outputs: Tensor, transpose: Callable[[Tensor], Tree]) -> Any:
    """``transpose`` of the columns of the square root of every example's Hessian, ``[columns, ...]``.

    One column for each entry of all axes but the first: several terms of one example, such as the
    positions of a sequence, depend on the same weights, and one pass for all of them would mix them.
    """
    shape = outputs.shape[1:]
    numbers = torch.arange(shape.numel(), device=outputs.device)

    def taken_back(column: Tensor) -> Tree:
        unit = (numbers == column).to(outputs.dtype).reshape(1, *shape).expand(outputs.shape)
        return transpose(likelihood.square_root(outputs, unit))

    whole: Any = None
    for part in numbers.split(COLUMNS):
        at_part = vmap(taken_back)(part)
        if whole is None:
            whole = optree.tree_map(lambda g: g.new_empty(len(numbers), *g.shape[1:]), at_part)
            rest = whole
        optree.tree_map_(lambda w, g: w[: len(g)].copy_(g), rest, at_part)  # joined later, all would be there twice
        rest = optree.tree_map(lambda w, g: w[len(g) :], rest, at_part)
    return whole
