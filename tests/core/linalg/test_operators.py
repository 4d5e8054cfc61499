"""Operators: what they apply is what they stand for. As pytrees, stacked and mapped: ``test_products.py``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.operators import split_damping
from lrkfac.linalg import Diagonal, Kronecker, to_dense
from lrkfac.testing import operators
from tests import reference


@given(operators(dtype=torch.float64), st.integers(1, 3), st.floats(0, 10))
def test_what_is_applied_is_the_dense_matrix(operator, k, shift):
    """The dampings of two factors are those of the reference."""
    matrix, close = to_dense(operator), torch.testing.assert_close
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
            close(torch.stack(split_damping(operator, torch.tensor(shift).double())), dampings)
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
    one, huge = torch.ones(1, 1, dtype=torch.float64), torch.full((1,), 1e12, dtype=torch.float64)
    operator = EigenbasisKronecker(one, one, 0.3 * one, huge, huge, huge[0])
    x = torch.tensor([0.7], dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), 0.3 * x, rtol=1e-15, atol=0)
