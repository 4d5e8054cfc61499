"""The Kronecker factors of a layer as covariances, from its statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import wide
from lrkfac.core.layers.description import Layer, Treatment
from lrkfac.core.layers.kind import Kind, Options
from lrkfac.core.layers.kinds import BIAS, JACOBIAN, KINDS, LINEAR, counts
from lrkfac.core.layers.matrix import joined_gradient
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.linalg.covariances import (
    Covariance,
    DiagonalCovariance,
    KroneckerFactors,
    RowCovariance,
    SumCovariance,
    joined_rows,
    scaled,
)


@dataclass(frozen=True)
class InputCovariance:
    """``A = mean over rows of a aᵀ`` of one group, touched only through the layer's own operation.

    Half-precision inputs are treated in float32.

    Attributes:
        kind: The kind of the uses.
        inputs: Inputs of the operation, one tensor for each use.
        options: The settings of each use.
        dimension: ``d``, with the trailing 1 of a joint bias.
        joint: Whether there is a joint bias.
    """

    kind: Kind
    inputs: Uses
    options: tuple[Options, ...]
    dimension: int
    joint: bool

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """``A V`` by the operation with ``V`` in place of its weights, and its transpose."""
        total, rows = torch.zeros_like(vectors), 0
        for a, options, s in self._along(vectors.mT):
            total = total + joined_gradient(self.kind, a, s, self.dimension - self.joint, options, self.joint).mT
            rows += s.numel() // vectors.shape[1]
        return total / rows

    def between(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
        """``x A xᵀ``, by the operation alone."""
        total, rows = x.new_zeros(x.shape[0], x.shape[0]), 0
        for _, options, s in self._along(x):
            along = s.movedim(self.kind.channel(options), 0).flatten(1)
            total = total + along @ along.mT
            rows += along.shape[1]
        return total / rows

    def _along(self, x: Tensor) -> Iterator[tuple[Tensor, Options, Tensor]]:
        """Yield of each use its input, its settings, and the operation with ``x`` in the place of the weights."""
        assert self.kind.operation is not None
        weights, constants = (x[:, :-1], x[:, -1]) if self.joint else (x, None)
        for a, options in zip(self.inputs, self.options, strict=True):
            a = wide(a)
            s = self.kind.operation(a, weights, options)
            trailing = [1] * (-self.kind.channel(options) - 1)
            yield a, options, s if constants is None else s + constants.reshape(-1, *trailing)

    def diagonal(self) -> Float[Tensor, "d"]:
        """The mean of the squared rows, by the operation's transpose on the squared input."""
        assert self.kind.operation is not None
        d = self.dimension - self.joint
        if not self.kind.picks:
            squares = mean_squares(self.kind, [wide(a) for a in self.inputs], self.options, d)
            return torch.cat([squares, squares.new_ones(1)]) if self.joint else squares
        total, rows = torch.zeros((), dtype=wide(self.inputs[0]).dtype, device=self.inputs[0].device), 0
        for a, options in zip(self.inputs, self.options, strict=True):
            a = wide(a)
            one = torch.ones_like(self.kind.operation(a, a.new_zeros(1, d), options))
            total = total + joined_gradient(self.kind, a.square(), one, d, options, self.joint)[0]
            rows += one.numel()
        return total / rows

    def trace(self) -> Float[Tensor, ""]:
        """The mean squared length of a row."""
        return self.diagonal().sum()

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix, column by column by ``matvec``."""
        like = wide(self.inputs[0])
        return self.matvec(torch.eye(self.dimension, dtype=like.dtype, device=like.device))


def kronecker_factors(
    layer: Layer,
    inputs: Uses,
    gradients: Uses,
    scale: Tensor,
    treatment: Treatment = "expand",
    stacked: bool = False,
) -> KroneckerFactors:
    """Return ``B`` and ``A`` of one group, for ``G_n = Σ_t g_t a_tᵀ`` with ``t`` over positions and uses of an example.

    *Expand* takes the terms for independent: ``B = scale * sum of g gᵀ`` and ``A = mean of a aᵀ`` over all rows.
    *Reduce* takes the inputs of an example for equal, ``G_n ≈ ḡ_n ā_nᵀ`` with ``ḡ_n = Σ_t g_t`` and ``ā_n`` the mean
    of ``a_t``: ``B = scale * sum of ḡ ḡᵀ``, ``A = mean of ā āᵀ`` over examples (Eschenhagen et al. 2023, arXiv
    2311.00636, section 3). Without sharing they are the same.

    Without gradients ``B`` is the identity.

    Where a weight is used in two ways (an embedding tied to the output layer), its block is a sum of Kronecker
    products, see ``of_parts``.

    Args:
        layer: The layer.
        inputs: Inputs of one group of it, one tensor for each use.
        gradients: The gradients at its outputs, likewise, or none.
        scale: Weight of each example in the sums of ``B``, ``[]``.
        treatment: ``"expand"`` or ``"reduce"``.
        stacked: Whether statistics of several such layers are stacked along a leading axis; for kinds in
            ``WITH_PLAIN_ROWS`` and ``"expand"`` alone.
    """
    return of_parts(kronecker_parts(layer, inputs, gradients, scale, treatment, stacked))


def kronecker_parts(
    layer: Layer,
    inputs: Uses,
    gradients: Uses,
    scale: Tensor,
    treatment: Treatment = "expand",
    stacked: bool = False,
    share: Tensor | None = None,
    first: bool = True,
) -> tuple[KroneckerFactors, ...]:
    """Return ``B`` and ``A`` for each way to use the weight, of one way alone those of ``kronecker_factors``.

    With ``share``, of the examples of all processes the share of this one, parts add up over processes: sums of
    ``g gᵀ`` by themselves, as ``scale`` is that of all examples; means over rows with this weight; the identity in the
    place of ``B`` as that of the ``first`` process alone, so that it is exact: what few vectors make of equal
    eigenvalues hangs on rounding.
    """
    by_kind = []
    for name in dict.fromkeys(layer.kinds):
        chosen = [i for i, kind in enumerate(layer.kinds) if kind == name]
        options = tuple(layer.options[i] for i in chosen)
        a, g = tuple(inputs[i] for i in chosen), tuple(gradients[i] for i in chosen if gradients)
        if treatment == "expand":
            factors = _expand(layer, KINDS[name], options, a, g, scale, stacked)
        else:
            factors = _reduce(layer, KINDS[name], options, a, g, scale)
        by_kind.append(factors if share is None else _part(factors, KINDS[name], bool(g), share, first))
    return tuple(by_kind)


def _part(factors: KroneckerFactors, kind: Kind, gradients: bool, share: Tensor, first: bool) -> KroneckerFactors:
    """Return factors of which means have the weight of this process, and identities are the first one's."""
    mean, moment = factors if kind.one_hot else reversed(factors)
    mean = scaled(mean, share)
    if not gradients:
        moment = scaled(moment, share.new_full((), float(first)))
    return KroneckerFactors(mean, moment) if kind.one_hot else KroneckerFactors(moment, mean)


def of_parts(parts: tuple[KroneckerFactors, ...]) -> KroneckerFactors:
    """Return the Kronecker product in the place of ``Σ Bₖ ⊗ Aₖ``: that of its partial traces,
    ``(Σ tr(Aₖ) Bₖ) ⊗ (Σ tr(Bₖ) Aₖ) / Σ tr(Aₖ) tr(Bₖ)``.
    """
    if len(parts) == 1:
        return parts[0]
    weights = partial_trace_weights([(B.trace(), A.trace()) for B, A in parts])
    sides = zip(zip(*parts, strict=True), zip(*weights, strict=True), strict=True)
    return KroneckerFactors(*[SumCovariance(of_side, factors) for of_side, factors in sides])


def partial_trace_weights(traces: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of parts ``Bₖ`` and ``Aₖ`` in the factors of ``of_parts``, from their traces."""
    total = torch.stack([b * a for b, a in traces]).sum()
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return [(a / total.sqrt(), b / total.sqrt()) for b, a in traces]


WITH_PLAIN_ROWS = frozenset({LINEAR.name, BIAS.name, JACOBIAN.name})
"""Kinds whose rows are a reshape of their inputs and gradients, also of several layers stacked."""


def _expand(
    layer: Layer,
    kind: Kind,
    options: tuple[Options, ...],
    inputs: Uses,
    gradients: Uses,
    scale: Tensor,
    stacked: bool,
) -> KroneckerFactors:
    d = layer.d_in if kind.one_hot else layer.d_out
    if gradients:
        joined = joined_rows([_rows(g, d, stacked) for g in _channels_last(kind, options, gradients)])
        moment: Covariance = RowCovariance(joined, scale.to(joined.dtype))
    else:
        joined = scale.new_ones(inputs[0].shape[0], d) if stacked else scale.new_ones(d)
        moment = DiagonalCovariance(joined)
    if kind.one_hot:
        number = sum(a.numel() for a in inputs)
        each = torch.stack([counts(a, *o) for a, o in zip(inputs, options, strict=True)]).sum(dim=0)
        return KroneckerFactors(DiagonalCovariance(each.to(joined.dtype) / number), moment)
    joint = layer.appends
    if kind.rows is None:
        return KroneckerFactors(moment, InputCovariance(kind, inputs, options, layer.d_in, joint))
    if stacked:
        rows = joined_rows([_rows(wide(a), layer.d_in - joint, stacked) for a in inputs])
    else:
        rows = joined_rows([kind.rows(wide(a), layer.d_in - joint) for a in inputs])
    return KroneckerFactors(moment, RowCovariance(rows, rows.new_full((), 1 / max(rows.shape[-2], 1)), joint))


def _rows(x: Tensor, d: int, stacked: bool) -> Tensor:
    """Return rows ``[n, d]``, or ``[layers, n, d]``."""
    return x.reshape(x.shape[0], -1, d) if stacked else x.reshape(-1, d)


def _reduce(
    layer: Layer, kind: Kind, options: tuple[Options, ...], inputs: Uses, gradients: Uses, scale: Tensor
) -> KroneckerFactors:
    lengths = [a.shape[0] for a in inputs]
    if any(n != lengths[0] for n in lengths[1:]):
        return _reduce_each(layer, kind, options, inputs, gradients, scale)
    joint = layer.appends
    d = 1 if kind.one_hot else layer.d_in - joint
    # The sum of a_t is the gradient at outputs of one channel, each with the derivative 1: nothing is unfolded.
    if gradients:
        one_channel = [g[0].narrow(kind.channel(o), 0, 1) for g, o in zip(gradients, options, strict=True)]
    elif kind.operation is None:
        one_channel = [a[..., None] for a in inputs]
    else:
        one_channel = [kind.operation(a, a.new_zeros(1, d), o) for a, o in zip(inputs, options, strict=True)]
    ones = tuple(torch.ones_like(x, dtype=scale.dtype) for x in one_channel)
    examples = ones[0].shape[0]
    positions = sum(one.numel() for one in ones) // examples

    def mean_row(a: Uses, g: Uses) -> Tensor:
        parts = [joined_gradient(kind, x, one, d, o, joint) for x, one, o in zip(a, g, options, strict=True)]
        return torch.stack(parts).sum(dim=0).reshape(-1) / positions

    means = vmap(mean_row)(tuple(wide(a) for a in inputs), ones)
    if gradients:
        sums = [g.flatten(2, -2).sum(dim=2) if g.ndim > 3 else g for g in _channels_last(kind, options, gradients)]
        summed = torch.stack(sums).sum(dim=0).flatten(0, 1)
        moment: Covariance = RowCovariance(summed, scale.to(summed.dtype))
    else:
        moment = DiagonalCovariance(scale.new_ones(layer.d_in if kind.one_hot else layer.d_out))
    mean = RowCovariance(means, torch.full((), 1 / examples, dtype=means.dtype, device=means.device))
    return KroneckerFactors(mean, moment) if kind.one_hot else KroneckerFactors(moment, mean)


def _reduce_each(
    layer: Layer, kind: Kind, options: tuple[Options, ...], inputs: Uses, gradients: Uses, scale: Tensor
) -> KroneckerFactors:
    """Return the factors of uses on different numbers of examples, each its own: theirs by number, joined."""
    lengths = [a.shape[0] for a in inputs]
    distinct, pairs = tuple(dict.fromkeys(lengths)), []
    for length in distinct:
        some = [i for i, n in enumerate(lengths) if n == length]
        a, g = tuple(inputs[i] for i in some), tuple(gradients[i] for i in some if gradients)
        factors = _reduce(layer, kind, tuple(options[i] for i in some), a, g, scale)
        pairs.append(factors if kind.one_hot else tuple(reversed(factors)))
    means, moments = zip(*pairs, strict=True)
    mean = SumCovariance(means, tuple([scale.new_full((), n / sum(distinct)) for n in distinct]))
    moment = SumCovariance(moments, (torch.ones_like(scale),) * len(distinct)) if gradients else moments[0]
    return KroneckerFactors(mean, moment) if kind.one_hot else KroneckerFactors(moment, mean)


def _channels_last(kind: Kind, options: tuple[Options, ...], gradients: Uses) -> list[Tensor]:
    channels = [kind.channel(o) for o in options]
    return [wide(g) if c == -1 else wide(g).movedim(c, -1) for g, c in zip(gradients, channels, strict=True)]


COLUMNS = 64
"""Number of columns of rows that are formed at a time, where rows are not made of the input's entries."""


def mean_squares(kind: Kind, inputs: Sequence[Tensor], each: Sequence[Options], d: int) -> Tensor:
    """Return the mean of the squared rows of some uses, ``[d]``, by the rows themselves, ``op(a, I)``."""
    assert kind.operation is not None
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
    eye, means = torch.eye(d, dtype=dtype, device=inputs[0].device), []
    for part in eye.split(COLUMNS):
        uses = [kind.operation(a, part, o).movedim(kind.channel(o), -1) for a, o in zip(inputs, each, strict=True)]
        rows = torch.cat([s.reshape(-1, len(part)) for s in uses])
        means.append(rows.square().mean(dim=0))
    return torch.cat(means)
