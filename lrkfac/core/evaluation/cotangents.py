"""What is taken back from the outputs to the layers: made a few at a time, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.eager import has_values
from lrkfac.core.base.types import Tree
from lrkfac.core.likelihoods.joint import Joint, Leaves
from lrkfac.core.likelihoods.protocol import Likelihood

COLUMNS = 16
"""Columns of the output Hessian's square root that the exact estimator takes back at once."""


NUMBERS = 2**22
"""Outputs for which targets are drawn at once: what that takes beside the cotangent itself."""


def sampled_cotangents(
    heads: Joint,
    outputs: Leaves,
    targets: Leaves,
    factors: Sequence[Tensor | float],
    transpose: Callable[[list[Tensor]], Tree],
    samples: int,
    noise: Tree | None,
) -> Any:
    """``transpose`` of the gradients of the terms at targets drawn from the model, ``[samples, ...]``.

    All heads are drawn independently, so that products across them vanish in expectation.

    Args:
        heads: What the outputs mean.
        outputs: Of each head.
        targets: Of each head, for the weights of the terms.
        factors: Of each head, see ``Joint.normalization``.
        transpose: Linear in cotangents like the outputs.
        samples: Number of draws.
        noise: Uniform on [0, 1), ``[samples, ...]`` in the structure of the outputs; drawn where it is ``None``.

    Raises:
        ValueError: If ``noise`` is not ``[samples, *outputs.shape]``, on another device, or outside [0, 1) (where it is
            on the CPU and its values known).
        TypeError: If it is of integers.
    """
    given = None if noise is None else heads.leaves(noise, "noise")
    for f, u in zip(outputs, given or (), strict=given is not None):
        if u.device != f.device:
            raise ValueError(f"noise: expected numbers on {f.device}, as the outputs, got {u.device}")
        if tuple(u.shape) != (samples, *f.shape):
            raise ValueError(f"noise: expected uniform numbers of shape {(samples, *f.shape)}, got {tuple(u.shape)}")
        if not u.is_floating_point():
            raise TypeError(f"noise: expected floating-point numbers on [0, 1), got {u.dtype}; see torch.rand")
        if has_values(u) and not (u.min() >= 0 and u.max() <= 1):  # 1 by rounding to a lower precision
            raise ValueError(f"noise: expected numbers on [0, 1), got some from {u.min():g} to {u.max():g}")
    parts = []
    for i in range(samples):
        draws = [None] * len(outputs) if given is None else [u[i] for u in given]
        of_heads = zip(heads.heads, outputs, targets, draws, strict=True)
        parts.append(transpose(_times(factors, [sampled_cotangent(*one) for one in of_heads])))
    return optree.tree_map(lambda *g: g[0][None] if samples == 1 else torch.stack(g), *parts)


def sampled_cotangent(head: Likelihood, outputs: Tensor, targets: Tensor, noise: Tensor | None) -> Tensor:
    """One of one head, of the shape of ``outputs``."""

    def part(outputs: Tensor, targets: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            noise = torch.rand(outputs.shape, dtype=wide(outputs).dtype, device=outputs.device)
        return head.weighted_score(outputs, targets, noise)

    at_once = max(NUMBERS * outputs.shape[0] // outputs.numel(), 1)
    parts = list(zip(outputs.split(at_once), targets.split(at_once), strict=True))
    draws = [None] * len(parts) if noise is None else noise.split(at_once)
    return torch.cat([part(f, y, u) for (f, y), u in zip(parts, draws, strict=True)])


def exact_cotangents(
    heads: Joint,
    outputs: Leaves,
    targets: Leaves,
    factors: Sequence[Tensor | float],
    transpose: Callable[[list[Tensor]], Tree],
) -> Any:
    """``transpose`` of the columns of the square root of every example's Hessian, ``[columns, ...]``; arguments as
    above.
    """
    numbers = torch.arange(heads.columns(outputs), device=outputs[0].device)

    def taken_back(number: Tensor) -> Tree:
        return transpose(_times(factors, heads.column(outputs, targets, number)))

    whole: Any = None
    for part in numbers.split(COLUMNS):
        at_part = vmap(taken_back)(part)
        if whole is None:
            whole = optree.tree_map(lambda g: g.new_empty(len(numbers), *g.shape[1:]), at_part)
            rest = whole
        optree.tree_map_(lambda w, g: w[: len(g)].copy_(g), rest, at_part)  # joined later, all would be there twice
        rest = optree.tree_map(lambda w, g: w[len(g) :], rest, at_part)
    return whole


def _times(factors: Sequence[Tensor | float], cotangents: list[Tensor]) -> list[Tensor]:
    return [
        (factor * g).to(g.dtype) if isinstance(factor, Tensor) else g
        for factor, g in zip(factors, cotangents, strict=True)
    ]


def divided(cotangent: list[Tensor], scale: Tensor | None) -> list[Tensor]:
    """The cotangent of the mean loss over the factor that makes a mean of the terms; as it is without one."""
    if scale is None:
        return cotangent
    scale = torch.where(scale == 0, 1, scale)  # of what counts nothing, rows are zero
    return [(c / scale).to(c.dtype) for c in cotangent]
