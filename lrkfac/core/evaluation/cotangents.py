"""Cotangents of the outputs, taken back to the layers a few at a time, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import widest
from lrkfac.core.base.eager import has_values
from lrkfac.core.base.hashing import new_seeds, uniform
from lrkfac.core.base.processes import Processes
from lrkfac.core.base.types import Tree
from lrkfac.core.likelihoods.joint import Joint, Leaves, longest_head
from lrkfac.core.likelihoods.protocol import Likelihood

COLUMNS_AT_ONCE = 16
"""Columns of the output Hessian's square root that the exact estimator takes back at once."""


OUTPUTS_AT_ONCE = 2**22
"""Outputs for which targets are drawn at once, since the drawing needs memory beside the cotangent itself."""

Noise = Callable[[int, int, slice], Tensor]
"""``(sample, head, part) -> `` uniform numbers for a part of the examples of one head."""


def sampled_cotangents(
    heads: Joint,
    outputs: Leaves,
    targets: Leaves,
    factors: Sequence[Tensor | float],
    transpose: Callable[[list[Tensor]], Tree],
    samples: int,
    noise: Tree | None,
    processes: Processes | None = None,
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
        processes: Those that share a joint batch, each of which draws its part, see ``example_numbers``.

    Returns:
        ``transpose`` of the cotangents, with a leading axis of length ``samples``.

    Raises:
        ValueError: If ``noise`` is not ``[samples, *outputs.shape]``, on another device, or outside [0, 1) (where it is
            on the CPU and its values known).
        TypeError: If it is of integers.
    """
    uniform_numbers = _noise(outputs, samples, None if noise is None else heads.leaves(noise, "noise"), processes)
    parts = []
    for i in range(samples):
        of_heads = enumerate(zip(heads.heads, outputs, targets, strict=True))
        cotangents = [sampled_cotangent(*head, partial(uniform_numbers, i, j)) for j, head in of_heads]
        parts.append(transpose(_multiplied(factors, cotangents)))
    return optree.tree_map(lambda *g: g[0][None] if samples == 1 else torch.stack(g), *parts)


def _noise(outputs: Leaves, samples: int, given: Leaves | None, processes: Processes | None) -> Noise:
    if given is not None:
        check_noise(given, outputs, samples)
        return lambda sample, head, part: given[head][sample, part]
    seeds = new_seeds(samples, len(outputs), device=outputs[0].device)
    numbers = example_numbers(longest_head(outputs), processes)

    def draw(sample: int, head: int, part: slice) -> Tensor:
        dtype = widest(outputs[head].dtype, torch.float32)
        return uniform(seeds[sample, head], numbers[: outputs[head].shape[0]][part], outputs[head].shape[1:], dtype)

    return draw


def example_numbers(outputs: Tensor, processes: Processes | None) -> Tensor:
    """Return the numbers of the examples of this process within the joint batch, int64 ``[N]``.

    Processes take turns, as in ``torch.utils.data.DistributedSampler``. So no two examples share a number, also where
    processes have batches of different sizes, and none needs to know those of the others. An example is an entry of
    the leading axis of the outputs.
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    return torch.arange(outputs.shape[0], device=outputs.device) * size + rank


def random_signs(heads: Joint, outputs: Leaves, noise: Any, processes: Processes | None = None) -> Tensor:
    """Return signs for ``exact_cotangents`` from uniform noise on [0, 1), ``[columns, N]``, drawn if it is ``None``.

    Args are those of ``sampled_cotangents``.

    Raises:
        ValueError: If the noise has another shape or device.
        TypeError: If it is no floating-point tensor.
    """
    first = longest_head(outputs)
    shape, device = (heads.columns(outputs), first.shape[0]), first.device
    if noise is None:
        noise = uniform(new_seeds(device=device), example_numbers(first, processes), shape[:1]).mT
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
        if u.numel() and has_values(u) and not (u.min() >= 0 and u.max() <= 1):  # 1 by rounding to a lower precision
            raise ValueError(f"noise: expected numbers on [0, 1), got some from {u.min():g} to {u.max():g}")


def sampled_cotangent(head: Likelihood, outputs: Tensor, targets: Tensor, noise: Callable[[slice], Tensor]) -> Tensor:
    """Return one draw's cotangent of one head, of the shape of ``outputs``."""
    if torch.compiler.is_compiling():  # which fuses all operations, and makes a number of parts a constant of the graph
        return head.weighted_score(outputs, targets, noise(slice(None)))
    examples = outputs.shape[0]
    at_once = max(OUTPUTS_AT_ONCE * examples // max(outputs.numel(), 1), 1)
    parts = [slice(start, start + at_once) for start in range(0, max(examples, 1), at_once)]
    return torch.cat([head.weighted_score(outputs[part], targets[part], noise(part)) for part in parts])


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
            column = [signs[: len(c)].to(c.dtype).reshape(-1, *[1] * (c.ndim - 1)) * c for c in column]
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


def given_cotangents(
    heads: Joint,
    outputs: Leaves,
    targets: Leaves,
    factors: Sequence[Tensor | float],
    transpose: Callable[[list[Tensor]], Tree],
) -> Any:
    """Take back the gradients of the terms of each head at the targets, in one column for each head.

    Args are those of ``exact_cotangents``. Where heads have examples of their own, products across them have no part in
    the empirical Fisher matrix.
    """
    columns = [transpose(column) for column in heads.scores(outputs, targets, factors)]
    return optree.tree_map(lambda *g: torch.stack(g), *columns)


def _multiplied(factors: Sequence[Tensor | float], cotangents: list[Tensor]) -> list[Tensor]:
    return [
        (factor * g).to(g.dtype) if isinstance(factor, Tensor) else g
        for factor, g in zip(factors, cotangents, strict=True)
    ]
