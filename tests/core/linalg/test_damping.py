"""Exactly damped Kronecker products are the dense inverse, for every pair of factors that has one."""

import itertools

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, TransposedKronecker
from lrkfac.linalg import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPlusIsotropic, inverse, to_dense
from lrkfac.testing import low_rank_plus_diagonals, operators, seeds
from lrkfac.testing.laws import float64
from lrkfac.testing.strategies import PRODUCTS, low_rank_plus_isotropics
from tests.dispatch import LargestTensor
from tests.tensors import normal

FACTORS = {
    "isotropic": lambda x, d: LowRankPlusIsotropic(torch.linalg.qr(x(d, 2)).Q, x(2).square() + 1, x().square() / 9),
    "diagonal too": lambda x, d: LowRankPlusDiagonal(x(d, 2) / d, x(2).square() + 1, x(d).square() / 9),
    "dense": lambda x, d: Dense((rows := x(3, d)).mT @ rows / 3),
    "diagonal": lambda x, d: Diagonal(x(d).square()),
}
PAIRS = [pair for pair in itertools.product(FACTORS, FACTORS) if pair != ("diagonal too", "diagonal too")]
each_pair = pytest.mark.parametrize("output, input", PAIRS, ids=[f"{output} x {input}" for output, input in PAIRS])
CLOSED = "isotropic", "dense"


def product(output, input, seed=0, dtype=torch.float64, sizes=(5, 7)):
    """A product of these kinds of factors."""
    generator = torch.Generator().manual_seed(seed)
    x = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    both = Kronecker(FACTORS[output](x, sizes[0]), FACTORS[input](x, sizes[1]))
    return optree.tree_map(lambda leaf: leaf.to(dtype), both)


def damped(operator, damping):
    matrix = to_dense(float64(operator))
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def exact(output, input, share, tolerance):
    """``share`` of the largest eigenvalue is added."""
    operator = Kronecker(output, input)
    matrix = damped(operator, 0)
    damping = share * max(float(torch.linalg.matrix_norm(matrix, 2)), 1e-12)
    expected = torch.linalg.inv(damped(operator, damping))
    found = inverse(operator, damping, exact=True)
    assert relative(to_dense(found), expected) <= tolerance
    gradient = normal(output.dimension, input.dimension).to(output[0].dtype)
    natural = (expected @ gradient.double().reshape(-1)).reshape(gradient.shape)
    assert float((found.two_sided(gradient).double() - natural).norm()) <= tolerance * expected.norm() * 10
    least = torch.linalg.eigvalsh(to_dense(float64(found)))[0]
    assert least > 0


factors = operators(8, torch.float64, 1e4).filter(lambda op: not isinstance(op, PRODUCTS))


@given(factors, factors, st.floats(-8, 0))
def test_float64(output, input, log_share):
    """To a condition number of 1e8."""
    if not (isinstance(output, LowRankPlusDiagonal) and isinstance(input, LowRankPlusDiagonal)):
        exact(output, input, 10**log_share, 2e-9 if 10**log_share > 1e-7 else 1e-8)


low_rank = low_rank_plus_isotropics(8, torch.float32, 1e3)


@given(low_rank_plus_diagonals(8, torch.float32, 1e3) | low_rank, low_rank, st.floats(-4, 0), st.booleans())
def test_float32_from_eigenpairs(output, input, log_share, swapped):
    exact(*((input, output) if swapped else (output, input)), 10**log_share, 2e-5)


@given(*[operators(8, torch.float32, 1e2).filter(lambda op: isinstance(op, Dense | Diagonal))] * 2, st.floats(-3, 0))
def test_float32_by_decomposition(output, input, log_share):
    """The decomposition is wrong by a few ulps of the largest eigenvalue, to which the damping is a share."""
    exact(output, input, 10**log_share, max(2e-5, 2e-6 / 10**log_share))


@each_pair
def test_the_form_is_the_smallest_that_there_is(output, input):
    kinds = {output, input}
    found = inverse(product(output, input), 0.1, exact=True)
    if kinds <= set(CLOSED):
        assert type(found) is EigenbasisKronecker
    else:
        turned = output in CLOSED or (input == "diagonal" and output == "diagonal too")
        assert type(found) is (TransposedKronecker if turned else EigenspaceKronecker)


@each_pair
def test_damping_again_and_inverting_again(output, input):
    """The forms are closed under both."""
    operator = product(output, input)
    once = inverse(operator, 0.1, exact=True)
    assert relative(to_dense(inverse(once)), damped(operator, 0.1)) <= 1e-9
    expected = torch.linalg.inv(damped(once, 0.3))
    assert relative(to_dense(inverse(once, 0.3)), expected) <= 1e-9
    torch.testing.assert_close(once.largest(), torch.linalg.matrix_norm(to_dense(once), 2), rtol=1.0, atol=0)
    assert once.largest() >= torch.linalg.matrix_norm(to_dense(once), 2) * (1 - 1e-9)


@each_pair
def test_rows_of_outer_products(output, input):
    found = inverse(product(output, input), 0.1, exact=True)
    left, right = normal(3, 5), normal(3, 7)
    rows = found.of_outer_products(left, right)
    torch.testing.assert_close(rows[0].mT @ rows[1], found.two_sided(left.mT @ right), rtol=1e-9, atol=1e-9)


@each_pair
def test_mapped_and_stacked_is_one_by_one(output, input):
    """Under ``vmap``, and with leading axes where an inverse is applied."""
    every, dampings = [product(output, input, seed) for seed in range(3)], torch.tensor([0.1, 0.2, 0.3]).double()
    stacked = optree.tree_map(lambda *x: torch.stack(x), *every)
    found = vmap(lambda op, damping: inverse(op, damping, exact=True))(stacked, dampings)
    apart = [inverse(op, damping, exact=True) for op, damping in zip(every, dampings, strict=True)]
    x, (left, right) = normal(3, 5, 7), (normal(3, 2, 5), normal(3, 2, 7))
    expected = torch.stack([op.two_sided(one) for op, one in zip(apart, x, strict=True)])
    torch.testing.assert_close(found.two_sided(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vmap(lambda op, x: op.two_sided(x))(found, x), expected, rtol=1e-9, atol=1e-9)
    rows = found.of_outer_products(left, right)
    expected = torch.stack([op.two_sided(a.mT @ b) for op, a, b in zip(apart, left, right, strict=True)])
    torch.testing.assert_close(rows[0].mT @ rows[1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("output", ["isotropic", "diagonal too", "diagonal"])
def test_what_rounding_leaves_of_the_largest_is_not_scaled_up(output):
    """In float32, along the largest eigenvalue, far above what is left: by differences it would be wrong by 1e4."""
    operator = product(output, "isotropic", dtype=torch.float32, sizes=(40, 30))
    B, A = operator
    if output == "isotropic":
        B = B._replace(rest=B.rest * 1e-6)
    operator = Kronecker(B, A._replace(rest=A.rest * 1e-6))
    found, matrix = inverse(operator, 1e-9, exact=True), to_dense(float64(operator))
    values, vectors = torch.linalg.eigh(matrix)
    top = vectors[:, -1].reshape(40, 30)
    along = (found.two_sided(top.float()).double() * top).sum()
    torch.testing.assert_close(along, 1 / values[-1], rtol=0.1 if output != "diagonal" else 0.5, atol=0)


def test_no_square_matrix_is_made_of_low_rank():
    d, r = 2048, 8
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(d, r, generator=generator)).Q
    A = LowRankPlusIsotropic(vectors, torch.ones(r), torch.tensor(0.1))
    for B, numbers in ((A, 2 * d * r), (LowRankPlusDiagonal(vectors, torch.ones(r), torch.ones(d)), (r + 1) * d * r)):
        with LargestTensor() as largest:
            found = inverse(Kronecker(B, A), 0.1, exact=True)
        assert largest.numel <= (r + 1) * (d + r) * r
        assert sum(x.numel() for x in optree.tree_leaves(found)) <= 1.5 * numbers + d * r


def test_refused():
    one = LowRankPlusDiagonal(torch.ones(3, 1), torch.ones(1), torch.ones(3))
    with pytest.raises(TypeError, match="needs eigenvectors of one factor, and both are LowRankPlusDiagonal"):
        inverse(Kronecker(one, one), 0.1, exact=True)
    with pytest.raises(TypeError, match="exact: expected True or False"):
        inverse(one, 0.1, exact=1)
    with pytest.raises(ValueError, match="expected one output for each of the input vectors"):
        to_dense(EigenspaceKronecker(Diagonal(torch.ones(2, 3)), torch.eye(4)[:, :2]))
    with pytest.raises(ValueError, match="operator: expected entries of one LowRankPlusIsotropic"):
        to_dense(LowRankPlusIsotropic(torch.eye(3)[:, :2], torch.ones(3), torch.tensor(1.0)))


@given(seeds)
def test_other_operators_are_damped_exactly_in_any_case(seed):
    operator = product("dense", "diagonal too", seed)
    for factor in operator:
        plain, found = inverse(factor, 0.1), inverse(factor, 0.1, exact=True)
        torch.testing.assert_close(to_dense(found), to_dense(plain), rtol=0, atol=0)
