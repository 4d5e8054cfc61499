"""Operators: what they apply is what they stand for."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.operators import split_damping
from lrkfac.linalg import Dense, Diagonal, Kronecker, to_dense
from lrkfac.testing import operators
from tests import reference


@given(operators(dtype=torch.float64), st.integers(1, 3))
def test_matvec_is_the_dense_matrix(operator, k):
    matrix = to_dense(operator)
    x = torch.randn(matrix.shape[0], k, dtype=torch.float64)
    assert operator.dimension == matrix.shape[0]
    torch.testing.assert_close(operator.matvec(x), matrix @ x)
    torch.testing.assert_close(operator.matvec(x[:, 0]), matrix @ x[:, 0])
    torch.testing.assert_close(operator.of_rows(x.mT), x.mT @ matrix)
    torch.testing.assert_close(operator.trace(), matrix.trace())
    torch.testing.assert_close(matrix, matrix.mT)


@given(operators(dtype=torch.float64), st.floats(0, 10))
def test_shifted_adds_to_the_diagonal(operator, shift):
    shifted = to_dense(operator.shifted(shift))
    if isinstance(operator, Kronecker):
        input_damping, output_damping = split_damping(operator, torch.tensor(shift, dtype=torch.float64))
        factors = to_dense(operator.output.shifted(output_damping)), to_dense(operator.input.shifted(input_damping))
        torch.testing.assert_close(shifted, torch.kron(*factors))
        torch.testing.assert_close(input_damping * output_damping, torch.tensor(shift, dtype=torch.float64))
    else:
        identity = torch.eye(shifted.shape[0], dtype=torch.float64)
        torch.testing.assert_close(shifted, to_dense(operator) + shift * identity)


def test_damping_is_split_as_in_the_reference():
    a, b = torch.rand(5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    found = split_damping(Kronecker(Diagonal(b), Diagonal(a)), 0.3)
    expected = reference.damping_split(torch.diag(a)[None], torch.diag(b)[None], 0.3)
    torch.testing.assert_close(torch.stack(found), torch.stack([x.squeeze() for x in expected]))


@pytest.mark.parametrize("zero", ["input", "output", "both"])
def test_a_zero_factor_splits_damping_evenly(zero):
    factors = {"input": Diagonal(torch.ones(2)), "output": Diagonal(torch.ones(3))}
    factors |= {name: Diagonal(torch.zeros(2)) for name in factors if zero in (name, "both")}
    assert split_damping(Kronecker(**factors), 0.25) == (torch.tensor(0.5), torch.tensor(0.5))


def test_two_sided_is_the_kronecker_product_on_the_row_major_vector():
    output, input = torch.randn(3, 3), torch.randn(4, 4)
    operator = Kronecker(Dense(output + output.mT), Dense(input + input.mT))
    gradient = torch.randn(3, 4)
    expected = to_dense(operator) @ gradient.reshape(-1)
    torch.testing.assert_close(operator.two_sided(gradient).reshape(-1), expected)
    torch.testing.assert_close(operator.matvec(gradient.reshape(-1)), expected)


@given(operators(max_dimension=8))
def test_operators_are_pytrees_and_map_over_batches(operator):
    stacked = optree.tree_map(lambda x: torch.stack([x, 2 * x]), operator)
    second = optree.tree_map(lambda x: 2 * x, operator)
    x = torch.ones(operator.dimension, dtype=optree.tree_leaves(operator)[0].dtype)
    both = vmap(lambda op: op.matvec(x))(stacked)
    rounding = 16 * torch.finfo(x.dtype).eps * to_dense(operator).abs().sum().item()  # sums may cancel
    torch.testing.assert_close(both[0], operator.matvec(x), rtol=0, atol=rounding)
    torch.testing.assert_close(both[1], second.matvec(x), rtol=0, atol=2 * rounding)


def test_what_complete_vectors_leave_has_no_effect():
    """Not even by rounding: the numbers for it may be larger by twelve orders."""
    one, huge = torch.ones(1, 1, dtype=torch.float64), torch.full((1,), 1e12, dtype=torch.float64)
    operator = EigenbasisKronecker(one, one, 0.3 * one, huge, huge, huge[0])
    x = torch.tensor([0.7], dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), 0.3 * x, rtol=1e-15, atol=0)
