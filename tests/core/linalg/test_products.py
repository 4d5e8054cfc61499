"""Operators apply the dense matrices that they stand for, from both sides and stacked; inverses are theirs."""

import optree
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import grad, vmap

from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.inverses import semidefinite_inverse
from lrkfac.core.linalg.operators import split_damping
from lrkfac.core.linalg.products import of_columns, of_rows, two_sided
from lrkfac.linalg import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, inverse, sherman_morrison, to_dense, woodbury
from lrkfac.testing import check_inverse, low_rank_plus_diagonals, operators
from lrkfac.testing.strategies import PRODUCTS
from tests import reference
from tests.dispatch import LargestTensor
from tests.tensors import normal

BOTH = pytest.mark.parametrize("invert", [woodbury, sherman_morrison])
ALL = pytest.mark.parametrize("invert", [woodbury, sherman_morrison, semidefinite_inverse])


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
    for found in (sherman_morrison(operator), woodbury(operator), semidefinite_inverse(operator)):
        assert (to_dense(found) - dense).norm() <= 1e-9 * dense.norm()
        assert torch.equal(found.diagonal, operator.diagonal.rsqrt().square())


@ALL
@given(low_rank_plus_diagonals(dtype=torch.float32, max_condition=1e8))
@example(drawn(512, 512, 1e8, torch.float32))
@example(drawn(512, 32, 1e8, torch.float32, orthonormal=True))
def test_float32_inverse_stays_positive_definite(invert, operator):
    found = to_dense(optree.tree_map(torch.Tensor.double, invert(operator)))
    assert torch.linalg.eigvalsh((found + found.mT) / 2)[0] > 0


@ALL
@pytest.mark.parametrize("d, rank", [(64, 64), (512, 256)])
def test_float32_inverse_stays_positive_definite_where_vectors_are_nearly_parallel(invert, d, rank):
    """Together they have an eigenvalue ``rank`` times as large as the one at which ``D`` is raised."""
    for seed in range(4 if invert is sherman_morrison else 8):
        vectors = normal(d, 1, seed=seed) + 0.01 * normal(d, rank, seed=seed + 100)
        vectors = (vectors / vectors.norm(dim=0)).float()
        found = invert(LowRankPlusDiagonal(vectors, torch.ones(rank), torch.full((d,), 1e-8)))
        assert torch.linalg.eigvalsh(to_dense(optree.tree_map(torch.Tensor.double, found)))[0] > 0


@ALL
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e8])
def test_float32_inverse_is_as_large_as_the_exact_one_along_equal_eigenvalues(invert, ratio):
    """Up to the ratio at which ``D`` is raised, and the margin from there on: then at most twice as large."""
    vectors = torch.linalg.qr(normal(128, 32)).Q
    found = invert(LowRankPlusDiagonal(vectors.float(), torch.ones(32), torch.full((128,), 1 / ratio)))
    lengths = (vectors.mT @ to_dense(optree.tree_map(torch.Tensor.double, found)) @ vectors).diagonal()
    assert (lengths <= 1 + 2 * 32 * torch.finfo(torch.float32).eps * min(ratio, 2**18)).all()
    assert (lengths >= 0 if ratio == 1e8 else lengths > 0.9).all()


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


@ALL
def test_no_square_matrix_is_made_of_one_or_of_a_stack(invert):
    operators = [drawn(7, 3, 1e3, torch.float64, seed) for seed in range(3)]
    stacked = optree.tree_map(lambda *parts: torch.stack(parts), *operators)
    found = vmap(lambda op: to_dense(invert(op)))(stacked)
    torch.testing.assert_close(found, torch.stack([to_dense(invert(op)) for op in operators]))
    d, r = 2048, 8
    with LargestTensor() as largest:
        found = invert(drawn(d, r, 1e4, torch.float32))
    assert largest.numel <= 2 * d * r and sum(x.numel() for x in found) == d * r + d + r


# Operators and their products --------------------------------------------------------------------------

low_rank = low_rank_plus_diagonals(dtype=torch.float64)
any_operator = operators(dtype=torch.float64) | low_rank
plain = any_operator.filter(lambda operator: not isinstance(operator, PRODUCTS))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def joined(parts):
    matrix, column = parts
    return torch.cat([matrix, column[..., None]], dim=-1)


@given(operators(dtype=torch.float64), st.integers(1, 3), st.floats(0, 10))
def test_what_is_applied_is_the_dense_matrix(operator, k, shift):
    matrix = to_dense(operator)
    x = torch.randn(matrix.shape[0], k, dtype=torch.float64)
    assert operator.dimension == matrix.shape[0]
    close(operator.matvec(x), matrix @ x)
    close(operator.matvec(x[:, 0]), matrix @ x[:, 0])
    close(operator.of_rows(x.mT), x.mT @ matrix)
    close(operator.trace(), matrix.trace())
    close(matrix, matrix.mT)
    if isinstance(operator, Kronecker):
        B, A = to_dense(operator.output), to_dense(operator.input)
        close(matrix, torch.kron(B, A))
        if B.trace() * A.trace() > 0:
            dampings = torch.stack(reference.damping_split(A[None], B[None], shift)).squeeze()
            close(torch.stack(split_damping(operator, torch.tensor(shift, dtype=torch.float64))), dampings)
            B, A = (m + s * torch.eye(len(m)).double() for m, s in zip((B, A), dampings.flip(0), strict=True))
            close(to_dense(operator.shifted(shift)), torch.kron(B, A))
    else:
        close(to_dense(operator.shifted(shift)), matrix + shift * torch.eye(len(matrix)).double())


@pytest.mark.parametrize("zero", ["input", "output", "both"])
def test_a_zero_factor_splits_damping_evenly(zero):
    factors = {"input": Diagonal(torch.ones(2)), "output": Diagonal(torch.ones(3))}
    factors |= {name: Diagonal(torch.zeros(2)) for name in factors if zero in (name, "both")}
    assert split_damping(Kronecker(**factors), 0.25) == (torch.tensor(0.5), torch.tensor(0.5))


def test_what_complete_vectors_leave_has_no_effect():
    """Not even by rounding: the numbers for it may be larger by twelve orders."""
    u, v = (torch.linalg.qr(normal(d, d)).Q for d in (3, 4))
    huge = [torch.full((d,), 1e12, dtype=torch.float64) for d in (3, 4)]
    x, kept = normal(3, 4, seed=1), torch.full((3, 4), 0.3, dtype=torch.float64)
    for columns in (u, u[:, :2]):  # complete on both sides, or on one
        k = columns.shape[1]
        operator = EigenbasisKronecker(columns, v, kept[:k], huge[0][:k], 0.3 * kept[0], huge[0][0])
        spanned = columns @ columns.mT @ x
        expected = 0.3 * spanned + 0.09 * (x - spanned)
        torch.testing.assert_close(operator.matvec(x.reshape(-1)), expected.reshape(-1), rtol=1e-12, atol=1e-12)


@given(any_operator, any_operator, st.integers(0, 2**16))
def test_the_last_column_apart_is_the_last_column(output, input, seed):
    torch.manual_seed(seed)
    x = torch.randn(output.dimension, input.dimension, dtype=torch.float64)
    expected = to_dense(output) @ x @ to_dense(input)
    close(two_sided(Kronecker(output, input), x, None)[0], expected)
    close(joined(two_sided(Kronecker(output, input), x[:, :-1], x[:, -1])), expected)
    close(joined(of_rows(input, x[:, :-1], x[:, -1])), x @ to_dense(input))
    ones = torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], dim=1)
    close(joined(of_rows(input, x[:, :-1], x.new_ones(()))), ones @ to_dense(input))
    close(of_columns(output, x), to_dense(output) @ x)


@given(plain, plain, st.sampled_from([(), (2,)]), st.integers(0, 2**16))
def test_stacked_is_one_by_one(output, input, shape, seed):
    """Copies with other numbers along leading axes; an axis of length 3 or two axes."""
    torch.manual_seed(seed)
    x = torch.randn(*shape, 3, output.dimension, input.dimension, dtype=torch.float64)
    many = lambda x: torch.stack([x, 2 * x, 3 * x]).expand(*shape, 3, *x.shape)  # noqa: E731
    both = optree.tree_map(many, Kronecker(output, input))

    def of_each(function):
        for _ in range(len(shape) + 1):
            function = vmap(function)
        return function

    close(two_sided(both, x, None)[0], of_each(lambda o, i, x: two_sided(Kronecker(o, i), x, None)[0])(*both, x))
    found = two_sided(both, x[..., :-1], x[..., -1])
    close(found, of_each(lambda o, i, x: two_sided(Kronecker(o, i), x[:, :-1], x[:, -1]))(*both, x))
    found = of_rows(both.input, x[..., :-1], x.new_ones(()))
    close(found, of_each(lambda i, x: of_rows(i, x[:, :-1], x.new_ones(())))(both.input, x))
    close(of_rows(both.input, x, None)[0], of_each(lambda i, x: i.of_rows(x))(both.input, x))
    close(of_columns(both.output, x), of_each(of_columns)(both.output, x))


@given(low_rank, low_rank, st.sampled_from(["x", "output", "input"]))
def test_mapped_over_one_argument(output, input, which):
    """Nothing is changed in place that lacks the axis."""
    given = {"x": torch.ones(output.dimension, input.dimension).double(), "output": output, "input": input}
    of = lambda one: (lambda x, **both: two_sided(Kronecker(**both), x, None)[0])(**given | {which: one})  # noqa: E731
    many = optree.tree_map(lambda x: torch.stack([x, 2 * x]), given[which])
    close(vmap(of)(many)[1], of(optree.tree_map(lambda x: x[1], many)))


@given(low_rank, low_rank, st.booleans())
def test_derivatives(output, input, isotropic):
    """With respect to the matrix, by torch.func and by ``backward``: both operators are symmetric."""
    if isotropic:
        input = input._replace(diagonal=input.diagonal[:1].expand(input.dimension))
    x = torch.randn(output.dimension, input.dimension, dtype=torch.float64)
    v = torch.randn_like(x)
    of = lambda x, diagonal: (two_sided(Kronecker(output, input._replace(diagonal=diagonal)), x, None)[0] * v).sum()  # noqa: E731
    expected = to_dense(output) @ v @ to_dense(input), ((to_dense(output) @ x) * v).sum(dim=0)
    close(grad(of)(x, input.diagonal), expected[0])
    given = x.requires_grad_(), input.diagonal.clone().requires_grad_()
    of(*given).backward()
    close(tuple(leaf.grad for leaf in given), expected)


def test_nothing_larger_than_the_matrix_is_made():
    """Without a bias: ``tests/test_thin_step.py``."""
    d, r = 256, 3
    output, input = (LowRankPlusDiagonal(torch.ones(n, r), torch.ones(r), torch.ones(n)) for n in (d, d + 1))
    with LargestTensor() as largest:
        two_sided(Kronecker(output, input), torch.ones(d, d), torch.ones(d))
    assert largest.numel == d * d
