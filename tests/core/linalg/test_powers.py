"""Negative powers of damped operators are those of their dense matrices, alone and stacked."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.linalg.powers import KroneckerPower, negative_power
from lrkfac.linalg import Dense, Diagonal, LowRankPlusDiagonal, to_dense
from tests import reference
from tests.tensors import close, normal


def low_rank(d, r, seed=0, residual=0.01):
    """Orthonormal vectors, eigenvalues over two decades and an isotropic rest."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (2 * torch.rand(r, generator=generator, dtype=torch.float64))
    vectors = torch.linalg.qr(normal(d, r, seed=seed)).Q
    rest = 0.0 if r == d else residual
    return LowRankPlusDiagonal(vectors, values - rest, torch.full((), rest).double().expand(d))


def dense(d, seed=0):
    rows = normal(2 * d, d, seed=seed)
    return Dense(rows.mT @ rows)


def diagonal(d, seed=0):
    return Diagonal(normal(d, seed=seed).square())


MAKE = {
    "low rank": lambda seed: low_rank(9, 3, seed),
    "full rank": lambda seed: low_rank(5, 5, seed),
    "dense": lambda seed: dense(6, seed),
    "diagonal": lambda seed: diagonal(6, seed),
}


@pytest.mark.parametrize("name", MAKE)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_powers_are_those_of_the_matrix(name, seed, exponent, share):
    operator = MAKE[name](seed)
    found, matrix = negative_power(operator, exponent, share), to_dense(operator)
    mean = matrix.trace() / len(matrix)
    close(found.mean, mean)
    assert type(found.operator) is type(operator)
    close(to_dense(found.operator), reference.negative_power(matrix / mean, exponent, share), 1e-8, 1e-9)
    expected = reference.negative_power(matrix, exponent, share * mean)
    close(to_dense(found.unscaled(exponent)), expected, 1e-8, 1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MAKE)
def test_several_at_once(name):
    each = [MAKE[name](seed) for seed in range(3)]
    several = type(each[0])(*[torch.stack(x) for x in zip(*each, strict=True)])
    for share in (0.1, torch.tensor([0.1, 0.2, 0.3]).double()):
        shares = [0.1] * 3 if isinstance(share, float) else share
        found = negative_power(several, 0.25, share)
        for i, one in enumerate(each):
            alone = negative_power(one, 0.25, shares[i])
            close(type(one)(*[x[i] for x in found.operator]), alone.operator)
            close(type(one)(*[x[i] for x in found.unscaled(0.25)]), alone.unscaled(0.25))


NOTHING = torch.zeros(3)
ZEROS = [Diagonal(NOTHING), Dense(torch.zeros(3, 3)), LowRankPlusDiagonal(torch.eye(3)[:, :2], NOTHING[:2], NOTHING)]


@pytest.mark.parametrize("operator", ZEROS, ids=lambda operator: type(operator).__name__)
def test_of_zero_it_is_the_identity(operator):
    found = negative_power(operator, 0.5, 1e-3)
    for one in (found.operator, found.unscaled(0.5)):
        close(to_dense(one), torch.eye(3))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale_in_float32(scale):
    operator = low_rank(9, 3)
    small = LowRankPlusDiagonal(operator.vectors.float(), (scale * operator.values).float(), scale * operator.diagonal)
    small = small._replace(diagonal=small.diagonal.float())
    expected = negative_power(operator, 0.5, 1e-3)
    close(to_dense(negative_power(small, 0.5, 1e-3).operator), to_dense(expected.operator).float(), 1e-4, 1e-4)


class Other(NamedTuple):
    """An operator of another class."""

    entries: torch.Tensor
    dimension: int = 2

    def trace(self):
        return self.entries.sum()


def test_of_others_there_is_none():
    assert KroneckerPower(diagonal(2), diagonal(3)).dimension == 6
    with pytest.raises(TypeError, match="operator: expected one whose powers are of its own class, got Other"):
        negative_power(Other(torch.ones(2)), 0.5, 0.1)
