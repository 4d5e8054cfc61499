"""Cotangents of the outputs, taken back to the layers a few at a time, never all at once."""

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

COLUMNS_AT_ONCE = 16
"""Columns of the output Hessian's square root that the exact estimator takes back at once."""


OUTPUTS_AT_ONCE = 2**22
"""Outputs for which targets are drawn at once, since the drawing needs memory beside the cotangent itself."""


def sampled_cotangents(
    heads: Joint,
    outputs: Leaves,
    targets: Leaves,
    factors: Sequence[Tensor | float],
    transpose: Callable[[list[Tensor]], Tree],
    samples: int,
    noise: Tree | None,
) -> Any:
    """Take back the gradients of the terms at targets drawn from the model.

    All heads are drawn independently, so that products across them vanish in expectation.

    Args:
        heads: The likelihood.
        outputs: Of each head.
        targets: Of each head, for the weights of the terms.
        factors: Of each head, see ``Joint.normalization``.
        transpose: Linear in cotangents like the outputs.
        samples: Number of draws.
        noise: Uniform on [0, 1), ``[samples, ...]`` in the structure of the outputs; drawn where it is ``None``.

    Returns:
        ``transpose`` of the cotangents, with a leading axis of length ``samples``.

    Raises:
        ValueError: If ``noise`` is not ``[samples, *outputs.shape]``, on another device, or outside [0, 1) (where it is
            on the CPU and its values known).
        TypeError: If it is of integers.
    """
    uniform = None if noise is None else heads.leaves(noise, "noise")
    if uniform is not None:
        check_noise(uniform, outputs, samples)
    parts = []
    for i in range(samples):
        draws = [None] * len(outputs) if uniform is None else [u[i] for u in uniform]
        of_heads = zip(heads.heads, outputs, targets, draws, strict=True)
        parts.append(transpose(_multiplied(factors, [sampled_cotangent(*head) for head in of_heads])))
    return optree.tree_map(lambda *g: g[0][None] if samples == 1 else torch.stack(g), *parts)


def random_signs(heads: Joint, outputs: Leaves, noise: Any) -> Tensor:
    """Return signs for ``exact_cotangents`` from uniform noise on [0, 1), ``[columns, N]``, drawn if it is ``None``.

    Raises:
        ValueError: If the noise has another shape or device.
        TypeError: If it is no floating-point tensor.
    """
    shape, device = (heads.columns(outputs), outputs[0].shape[0]), outputs[0].device
    if noise is None:
        noise = torch.rand(shape, device=device)
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"noise: expected uniform numbers on [0, 1), a tensor of shape {shape}, got {noise!r}")
    if tuple(noise.shape) != shape or noise.device != device:
        raise ValueError(
            f"noise: expected uniform numbers of shape {shape} on {device}, one for each column and output, got "
            f"{tuple(noise.shape)} on {noise.device}"
        )
    return torch.where(noise < 0.5, -1.0, 1.0)


def check_noise(noise: Leaves, outputs: Leaves, samples: int) -> None:
    """Raise unless the noise of each head fits its outputs; see ``sampled_cotangents``."""
    for f, u in zip(outputs, noise, strict=True):
        if u.device != f.device:
            raise ValueError(f"noise: expected numbers on {f.device}, as the outputs, got {u.device}")
        if tuple(u.shape) != (samples, *f.shape):
            raise ValueError(f"noise: expected uniform numbers of shape {(samples, *f.shape)}, got {tuple(u.shape)}")
        if not u.is_floating_point():
            raise TypeError(f"noise: expected floating-point numbers on [0, 1), got {u.dtype}; see torch.rand")
        if has_values(u) and not (u.min() >= 0 and u.max() <= 1):  # 1 by rounding to a lower precision
            raise ValueError(f"noise: expected numbers on [0, 1), got some from {u.min():g} to {u.max():g}")


def sampled_cotangent(head: Likelihood, outputs: Tensor, targets: Tensor, noise: Tensor | None) -> Tensor:
    """Return one draw's cotangent of one head, of the shape of ``outputs``."""

    def part(outputs: Tensor, targets: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            noise = torch.rand(outputs.shape, dtype=wide(outputs).dtype, device=outputs.device)
        return head.weighted_score(outputs, targets, noise)

    at_once = max(OUTPUTS_AT_ONCE * outputs.shape[0] // outputs.numel(), 1)
    parts = list(zip(outputs.split(at_once), targets.split(at_once), strict=True))
    draws = [None] * len(parts) if noise is None else noise.split(at_once)
    return torch.cat([part(f, y, u) for (f, y), u in zip(parts, draws, strict=True)])


def exact_cotangents(
    heads: Joint,
    outputs: Leaves,
    targets: Leaves,
    factors: Sequence[Tensor | float],
    transpose: Callable[[list[Tensor]], Tree],
    signs: Tensor | None = None,
) -> Any:
    """Take back the columns of the square root of every example's output Hessian.

    One pass takes back a column of all examples. Where an output depends on several examples, or an example has
    several entries of the outputs, their terms meet in one row and their products would stay. Random signs take these
    away in expectation.

    Args are those of ``sampled_cotangents``, and:
        signs: 1 or -1 for each column and entry of the leading axis, ``[columns, N]``; ``None`` for 1.

    Returns:
        ``transpose`` of the columns, with a leading axis of as many as there are.
    """
    indices = torch.arange(heads.columns(outputs), device=outputs[0].device)

    def transposed_column(index: Tensor, signs: Tensor | None) -> Tree:
        column = heads.column(outputs, targets, index)
        if signs is not None:
            column = [signs.to(c.dtype).reshape(-1, *[1] * (c.ndim - 1)) * c for c in column]
        return transpose(_multiplied(factors, column))

    whole: Any = None
    parts = indices.split(COLUMNS_AT_ONCE)
    for part, of_part in zip(
        parts, [None] * len(parts) if signs is None else signs.split(COLUMNS_AT_ONCE), strict=True
    ):
        columns = vmap(transposed_column, in_dims=(0, None if signs is None else 0))(part, of_part)
        if whole is None:
            whole = optree.tree_map(lambda g: g.new_empty(len(indices), *g.shape[1:]), columns)
            unfilled = whole
        optree.tree_map_(lambda w, g: w[: len(g)].copy_(g), unfilled, columns)  # a join later would hold all twice
        unfilled = optree.tree_map(lambda w, g: w[len(g) :], unfilled, columns)
    return whole


def _multiplied(factors: Sequence[Tensor | float], cotangents: list[Tensor]) -> list[Tensor]:
    return [
        (factor * g).to(g.dtype) if isinstance(factor, Tensor) else g
        for factor, g in zip(factors, cotangents, strict=True)
    ]
