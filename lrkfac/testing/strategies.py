"""Hypothesis strategies: operators, factors and layers by size, rank, seed, dtype and condition number."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from hypothesis import strategies as st
from torch import Tensor

from lrkfac.core.base.types import Tree
from lrkfac.core.layers.convolutions import CONVOLUTIONS, ConvolutionOptions
from lrkfac.core.layers.description import Layer, Parameter
from lrkfac.core.layers.kinds import LINEAR, LinearOptions
from lrkfac.core.layers.placement import IN_FRONT
from lrkfac.core.layers.views import Step
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, LowRankPlusIsotropic, TransposedKronecker
from lrkfac.core.linalg.operator_checks import OPERATORS
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator

PRODUCTS = (Kronecker, EigenbasisKronecker, EigenspaceKronecker, TransposedKronecker)
"""Operators on matrices of two sides."""

dtypes = st.sampled_from([torch.float64, torch.float32])
"""Draws torch.float64 or torch.float32."""

seeds = st.integers(0, 2**31 - 1)
"""Draws seeds of ``torch.Generator``."""


class LayerCase(NamedTuple):
    """A layer with the ``inputs`` of one use and the gradients at its output, in standard form."""

    layer: Layer
    inputs: Tensor
    output_gradients: Tensor


@st.composite
def covariances(
    draw: st.DrawFn, max_dimension: int = 24, dtype: torch.dtype | None = None, max_condition: float = 1e6
) -> RowCovariance:
    """Draw second moments of ``n`` rows, also with fewer rows than columns, dead columns, or nothing but zeros.

    Examples:
        >>> from hypothesis import given
        >>> @given(covariances(max_dimension=4))
        ... def test(covariance):
        ...     assert covariance.trace() >= 0
        >>> test()

    Args:
        draw: Passed by hypothesis.
        max_dimension: The largest number of columns.
        dtype: The dtype of the rows; by default drawn, too.
        max_condition: The largest condition number: scales of columns spread over its square root.

    Returns:
        The covariance of the rows.
    """
    d, n = draw(st.integers(1, max_dimension)), draw(st.integers(1, 2 * max_dimension))
    generator, dtype = generator_of(draw(seeds)), dtype or draw(dtypes)
    log_condition = draw(st.floats(0, torch.tensor(max_condition).log10().item()))
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -log_condition / 2, d, dtype=torch.float64)
    rows = rows * draw(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 1e3, 0.0]))
    if draw(st.booleans()):
        rows = rows * (torch.rand(d, generator=generator) < 0.8)
    return RowCovariance(rows.to(dtype), torch.tensor(1 / n, dtype=dtype))


@st.composite
def operators(
    draw: st.DrawFn, max_dimension: int = 24, dtype: torch.dtype | None = None, max_condition: float = 1e6
) -> Operator:
    """Draw positive semi-definite operators of every class; arguments as for ``covariances``."""
    dtype = dtype or draw(dtypes)
    kind = draw(st.sampled_from(OPERATORS))
    small = max(int(max_dimension**0.5), 1)
    if kind is Kronecker:
        factors = operators(small, dtype, max_condition**0.5).filter(lambda op: not isinstance(op, PRODUCTS))
        return Kronecker(draw(factors), draw(factors))
    if kind is EigenbasisKronecker:
        return draw(corrected_kroneckers(max_dimension, dtype, max_condition))
    if kind in (EigenspaceKronecker, TransposedKronecker):
        operator = draw(eigenspace_kroneckers(max_dimension, dtype, max_condition))
        return operator if kind is EigenspaceKronecker else TransposedKronecker(operator)
    if kind is LowRankPlusDiagonal:
        return draw(low_rank_plus_diagonals(max_dimension, dtype, max_condition))
    if kind is LowRankPlusIsotropic:
        return draw(low_rank_plus_isotropics(max_dimension, dtype, max_condition))
    covariance = draw(covariances(max_dimension, dtype, max_condition))
    return Diagonal(covariance.diagonal()) if kind is Diagonal else Dense(covariance.dense())


@st.composite
def low_rank_plus_isotropics(
    draw: st.DrawFn, max_dimension: int = 24, dtype: torch.dtype | None = None, max_condition: float = 1e6
) -> LowRankPlusIsotropic:
    """Draw orthonormal vectors, also complete ones, with values from 1 down to 1 over a condition number."""
    d = draw(st.integers(1, max_dimension))
    r, generator, dtype = draw(st.integers(1, d)), generator_of(draw(seeds)), dtype or draw(dtypes)
    smallest = 10 ** -draw(st.floats(0, torch.tensor(max_condition).log10().item()))
    vectors = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q
    values = smallest ** torch.rand(r, generator=generator, dtype=torch.float64)
    return LowRankPlusIsotropic(*[x.to(dtype) for x in (vectors, values, torch.tensor(smallest).double())])


@st.composite
def eigenspace_kroneckers(
    draw: st.DrawFn, max_dimension: int = 24, dtype: torch.dtype | None = None, max_condition: float = 1e6
) -> EigenspaceKronecker:
    """Draw products of a positive definite operator and one whose eigenvectors are known, as sums over these."""
    small, dtype = max(int(max_dimension**0.5), 1), dtype or draw(dtypes)
    kind: Any = draw(st.sampled_from([low_rank_plus_diagonals, low_rank_plus_isotropics]))
    output: LowRankPlusDiagonal | LowRankPlusIsotropic = draw(kind(small, dtype, max_condition**0.5))
    vectors, values, rest = draw(low_rank_plus_isotropics(small, dtype, max_condition**0.5))
    each = values if vectors.shape[0] == vectors.shape[1] else torch.cat([values, rest[None]])
    if isinstance(output, LowRankPlusIsotropic):
        matrices = each[:, None, None] * output.to_dense()
        return EigenspaceKronecker(Dense(matrices) if draw(st.booleans()) else Diagonal(_diagonals(matrices)), vectors)
    outer = each[:, None]
    stacked = output.vectors.expand(len(each), *output.vectors.shape)
    return EigenspaceKronecker(LowRankPlusDiagonal(stacked, outer * output.values, outer * output.diagonal), vectors)


def _diagonals(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


@st.composite
def corrected_kroneckers(
    draw: st.DrawFn, max_dimension: int = 24, dtype: torch.dtype | None = None, max_condition: float = 1e6
) -> EigenbasisKronecker:
    """Draw random bases, also complete ones, and eigenvalues up to 1 over a condition number; some are 0."""
    small = st.integers(1, max(int(max_dimension**0.5), 1))
    (d_out, d_in), generator = (draw(small), draw(small)), generator_of(draw(seeds))
    r_out, r_in = draw(st.integers(1, d_out)), draw(st.integers(1, d_in))
    smallest = 10 ** -draw(st.floats(0, torch.tensor(max_condition).log10().item()))
    zeros = draw(st.booleans())

    def basis(d: int, r: int) -> Tensor:
        return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q

    def values(*shape: int) -> Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        return torch.where(x < 0.2, 0.0, smallest**x) if zeros else smallest**x

    dtype = dtype or draw(dtypes)
    parts = basis(d_out, r_out), basis(d_in, r_in), values(r_out, r_in), values(r_out), values(r_in), values()
    return EigenbasisKronecker(*[part.to(dtype) for part in parts])


@st.composite
def low_rank_plus_diagonals(
    draw: st.DrawFn, max_dimension: int = 24, dtype: torch.dtype | None = None, max_condition: float = 1e6
) -> LowRankPlusDiagonal:
    """Draw ``V Λ Vᵀ + D`` with ``Λ ≥ 0`` up to 1 and ``D > 0``, also with repeated values, zero and repeated columns.

    ``max_condition`` bounds the ratio of the largest eigenvalue to the smallest entry of ``D``; the other arguments are
    as for ``covariances``.
    """
    d = draw(st.integers(1, max_dimension))
    r = draw(st.integers(1, d))
    generator, dtype = generator_of(draw(seeds)), dtype or draw(dtypes)
    smallest = 10 ** -draw(st.floats(0, torch.tensor(max_condition).log10().item()))
    vectors = torch.randn(d, r, generator=generator, dtype=torch.float64)
    orthonormal = draw(st.booleans())
    vectors = torch.linalg.qr(vectors).Q if orthonormal else vectors / vectors.norm(dim=0)
    values = smallest ** torch.rand(r, generator=generator, dtype=torch.float64)
    values = values.round(decimals=1) if draw(st.booleans()) else values
    if r > 1 and draw(st.booleans()):
        vectors = torch.cat([vectors[:, 1:], vectors[:, -1:] * draw(st.sampled_from([0.0, 1.0]))], dim=1)
    spread = 1 + 9 * torch.rand(d, generator=generator, dtype=torch.float64)
    diagonal = smallest * (spread if draw(st.booleans()) else torch.ones_like(spread))
    return LowRankPlusDiagonal(vectors.to(dtype), values.to(dtype), diagonal.to(dtype))


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> LayerCase:
    """Draw linear and convolution layers of any size and settings, with inputs and gradients."""
    generator = generator_of(draw(seeds))
    groups, bias = draw(st.integers(1, 3)), draw(st.booleans())
    n, d_in, d_out = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if draw(st.booleans()):
        positions = draw(st.sampled_from([(), (3,), (2, 3)]))
        layer = _layer(LINEAR.name, (d_out, d_in), bias, 1, tuple(LinearOptions()))
        return LayerCase(layer, normal(n, *positions, d_in), normal(n, *positions, d_out))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    side = st.integers(0, 2)
    padding = draw(st.tuples(st.tuples(side, side), st.tuples(side, side)))
    options = ConvolutionOptions(kernel, draw(pair), padding, draw(pair), groups)
    kind = CONVOLUTIONS[2]
    layer = _layer(kind.name, (groups * d_out, d_in, *kernel), bias, groups, tuple(options))
    inputs, weight = normal(n, groups * d_in, 6, 7), normal(1, d_in * kernel[0] * kernel[1])
    padded, _ = kind.prepare(inputs, normal(1, n, d_out, 1, 1), n, options, IN_FRONT)
    assert kind.operation is not None
    one = kind.operation(padded[:, :d_in], weight, options)
    return LayerCase(layer, padded, normal(n, groups * d_out, *one.shape[2:]))


def gradients(like: Tree, seed: int = 0) -> Tree:
    """Return a tree of normal numbers with the shapes, dtypes and devices of another.

    Examples:
        >>> import torch
        >>> gradients({"w": torch.ones(2, 3)})["w"].shape
        torch.Size([2, 3])

    Args:
        like: A tree of tensors.
        seed: The seed of the numbers.

    Returns:
        A tree of the same structure.
    """
    generator = generator_of(seed)
    return optree.tree_map(
        lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype), like
    )


def generator_of(seed: int) -> torch.Generator:
    """Return a random generator of torch with this seed."""
    return torch.Generator().manual_seed(seed)


def _layer(kind: str, shape: tuple[int, ...], bias: bool, groups: int, options: tuple[Any, ...]) -> Layer:
    weight = Parameter("layer.weight", 1 if bias else 0, shape, (Step("flatten", (1,)),) if len(shape) > 2 else ())
    joint = Parameter("layer.bias", 0, shape[:1]) if bias else None
    d_in = int(torch.Size(shape[1:]).numel()) + bias
    return Layer(
        "layer", (kind,), weight, joint, d_in, shape[0] // groups, groups, (options,), ((weight.path, 0),), (IN_FRONT,)
    )
