"""Inverses: one rank-one update after another, in matrix form, and dense, are one and the same."""

import optree
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.linalg import Dense, LowRankPlusDiagonal, inverse, sherman_morrison, to_dense, woodbury
from lrkfac.testing import check_inverse, low_rank_plus_diagonals, operators
from tests.dispatch import LargestTensor

BOTH = pytest.mark.parametrize("invert", [woodbury, sherman_morrison])


def drawn(d, r, ratio, dtype, seed=0, orthonormal=False):
    """Largest eigenvalue about 1, diagonal between 1 / ratio and 10 / ratio; a zero and a repeated column."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(d, r, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(vectors).Q if orthonormal else vectors / vectors.norm(dim=0)
    values = (1 / ratio) ** torch.rand(r, generator=generator, dtype=torch.float64)
    values[0] = 1
    if r > 4:
        vectors[:, 2] = 0
        vectors[:, 3], values[3] = vectors[:, 4], values[4]
    diagonal = (1 + 9 * torch.rand(d, generator=generator, dtype=torch.float64)) / ratio
    return LowRankPlusDiagonal(vectors.to(dtype), values.to(dtype), diagonal.to(dtype))


@given(operators(max_condition=1e6), st.floats(1e-6, 10))
def test_laws_of_the_inverse(operator, damping):
    check_inverse(operator, damping)


@given(low_rank_plus_diagonals(dtype=torch.float64, max_condition=1e6))
@example(drawn(256, 256, 1e6, torch.float64))
@example(drawn(512, 64, 1e6, torch.float64, orthonormal=True))
@example(drawn(300, 1, 1e6, torch.float64))
def test_rank_one_updates_matrix_form_and_dense_inverse_agree(operator):
    dense = torch.linalg.inv(to_dense(operator))
    for found in (sherman_morrison(operator), woodbury(operator)):
        assert (to_dense(found) - dense).norm() <= 1e-9 * dense.norm()
        assert torch.equal(found.diagonal, operator.diagonal.rsqrt().square())


@BOTH
@given(low_rank_plus_diagonals(dtype=torch.float32, max_condition=1e8))
@example(drawn(512, 512, 1e8, torch.float32))
@example(drawn(512, 32, 1e8, torch.float32, orthonormal=True))
def test_float32_inverse_stays_positive_definite(invert, operator):
    found = to_dense(optree.tree_map(torch.Tensor.double, invert(operator)))
    assert torch.linalg.eigvalsh((found + found.mT) / 2)[0] > 0


@pytest.mark.parametrize("d, rank, ratio", [(512, 1, 1e8), (512, 512, 1e8), (64, 20, 1e6), (2, 1, 1e8)])
def test_dense_float32_inverse_stays_positive_definite(d, rank, ratio):
    vectors = torch.linalg.qr(torch.randn(d, rank)).Q
    found = inverse(Dense(vectors @ vectors.mT), 1 / ratio).matrix.double()
    assert torch.linalg.eigvalsh((found + found.mT) / 2)[0] > 0


@BOTH
@given(low_rank_plus_diagonals(dtype=torch.float64, max_condition=1e3))
def test_negative_values_are_closed_under_inversion(invert, operator):
    once = invert(operator)
    assert (once.values <= 1e-12).all()
    twice = to_dense(invert(once))
    assert (twice - to_dense(operator)).norm() <= 1e-8 * to_dense(operator).norm()


@BOTH
def test_no_square_matrix_is_made_of_one_or_of_a_stack(invert):
    operators = [drawn(7, 3, 1e3, torch.float64, seed) for seed in range(3)]
    stacked = optree.tree_map(lambda *parts: torch.stack(parts), *operators)
    found = vmap(lambda op: to_dense(invert(op)))(stacked)
    torch.testing.assert_close(found, torch.stack([to_dense(invert(op)) for op in operators]))
    d, r = 2048, 8
    with LargestTensor() as largest:
        found = invert(drawn(d, r, 1e4, torch.float32))
    assert largest.numel <= 2 * d * r and sum(x.numel() for x in found) == d * r + d + r
