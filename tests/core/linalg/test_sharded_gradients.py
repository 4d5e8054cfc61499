"""The inverses of both factors are applied to a gradient whose rows or columns lie in different processes by one small
sum: what ``docs/mathematics.md`` says of sharded matrices.
"""

import pytest
import torch

from lrkfac.linalg import LowRankPlusDiagonal, inverse

D_OUT, D_IN, RANK = 13, 9, 3
ROWS, COLUMNS = [slice(0, 5), slice(5, 10), slice(10, 13), slice(13, 13)], [slice(0, 4), slice(4, 9)]
"""Of each process, the last of which has no row."""


def factor_inverse(d):
    vectors = torch.linalg.qr(torch.randn(d, RANK, dtype=torch.float64)).Q
    values, diagonal = torch.rand(RANK, dtype=torch.float64) + 1, torch.rand(d, dtype=torch.float64) + 0.5
    return inverse(LowRankPlusDiagonal(vectors, values, diagonal), 0.1)


def part(operator, some):
    """Rows of the vectors and entries of the diagonal: what the process of these rows keeps."""
    vectors, values, diagonal = operator
    return LowRankPlusDiagonal(vectors[some], values, diagonal[some])


@pytest.fixture
def case():
    torch.manual_seed(0)
    inverse_a, inverse_b = factor_inverse(D_IN), factor_inverse(D_OUT)
    gradient = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    return inverse_a, inverse_b, gradient, inverse_b.to_dense() @ gradient @ inverse_a.to_dense()


def test_rows(case):
    """One sum of r × d_in numbers."""
    inverse_a, inverse_b, gradient, expected = case
    parts = [(part(inverse_b, some), gradient[some]) for some in ROWS]
    projected = sum(b.vectors.mT @ g for b, g in parts)  # the only call
    assert projected.shape == (RANK, D_IN)
    for some, (b, g) in zip(ROWS, parts, strict=True):
        found = b.diagonal[:, None] * inverse_a.of_rows(g)
        found = found + b.vectors @ (b.values[:, None] * inverse_a.of_rows(projected))
        torch.testing.assert_close(found, expected[some], rtol=1e-12, atol=1e-12)


def test_columns(case):
    """One sum of d_out × r numbers."""
    inverse_a, inverse_b, gradient, expected = case
    parts = [(part(inverse_a, some), gradient[:, some]) for some in COLUMNS]
    projected = sum(g @ a.vectors for a, g in parts)
    assert projected.shape == (D_OUT, RANK)
    for some, (a, g) in zip(COLUMNS, parts, strict=True):
        found = inverse_b.matvec(g * a.diagonal + (projected * a.values) @ a.vectors.mT)
        torch.testing.assert_close(found, expected[:, some], rtol=1e-12, atol=1e-12)


def test_rows_and_columns(case):
    """Sums along the rows, along the columns, and one of r × r numbers along both."""
    inverse_a, inverse_b, gradient, expected = case
    blocks = [[gradient[i, j] for j in COLUMNS] for i in ROWS]
    bs, as_ = [part(inverse_b, i) for i in ROWS], [part(inverse_a, j) for j in COLUMNS]
    left = [sum(b.vectors.mT @ row[j] for b, row in zip(bs, blocks, strict=True)) for j in range(len(COLUMNS))]
    right = [sum(g @ a.vectors for a, g in zip(as_, row, strict=True)) for row in blocks]
    both = sum(b.vectors.mT @ x for b, x in zip(bs, right, strict=True))
    assert (left[0].shape, right[0].shape, both.shape) == ((RANK, 4), (5, RANK), (RANK, RANK))
    for i, b in enumerate(bs):
        for j, a in enumerate(as_):
            g = b.diagonal[:, None] * blocks[i][j] + b.vectors @ (b.values[:, None] * left[j])
            g_v = b.diagonal[:, None] * right[i] + b.vectors @ (b.values[:, None] * both)
            found = g * a.diagonal + (g_v * a.values) @ a.vectors.mT
            torch.testing.assert_close(found, expected[ROWS[i], COLUMNS[j]], rtol=1e-12, atol=1e-12)
