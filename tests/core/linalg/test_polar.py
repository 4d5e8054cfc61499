"""The polar factor: orthonormal rows or columns, the nearest such matrix, of any scale; its polynomials are optimal."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.core.linalg.polar import COEFFICIENTS, newton_schulz
from lrkfac.linalg import polar
from tests.compiling import traced
from tests.tensors import normal

SHAPES = [(6, 9), (9, 6), (5, 5), (1, 7), (7, 1), (1, 1), (3, 4, 6), (2, 3, 6, 4)]
LOWEST = 1e-3


def with_singular_values(m, n, values, seed=0):
    left, right = torch.linalg.qr(normal(m, len(values), seed=seed)).Q, torch.linalg.qr(normal(n, len(values))).Q
    return (left * values) @ right.mT, left @ right.mT


def near(found, expected, error):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_it_is_that_of_the_singular_vectors(shape, dtype, error):
    matrix = normal(*shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    for iterations in (None, 9):
        near(polar(matrix.to(dtype), iterations), (left @ right).to(dtype), error)


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 100), st.floats(-2, 0), st.sampled_from([5, 6, 7, 8, None])
)
def test_singular_values_come_to_1_as_far_as_it_says(m, n, seed, decades, iterations):
    r = min(m, n)
    values = 10 ** (decades * torch.rand(r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    matrix, expected = with_singular_values(m, n, values, seed)
    near(polar(matrix, iterations), expected, {5: 0.12, 6: 1e-3, 7: 4e-9}.get(iterations, 1e-11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [6, None])
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 1e37])
def test_scale_makes_no_difference(dtype, iterations, scale):
    matrix = normal(5, 8).to(dtype)
    near(polar(scale * matrix, iterations), polar(matrix, iterations), 1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("iterations", [6, None])
def test_zero_stays_zero_and_so_do_directions_without_a_singular_value(iterations):
    assert torch.equal(polar(torch.zeros(2, 3, 4), iterations), torch.zeros(2, 3, 4))
    matrix, expected = with_singular_values(6, 8, torch.tensor([3.0, 1.0, 0.5]).double())
    near(polar(matrix, iterations), expected, 1e-2)
    both = torch.stack([torch.zeros(6, 8).double(), matrix])
    assert torch.equal(polar(both, iterations)[0], both[0])
    assert polar(torch.zeros(3, 0), iterations).shape == (3, 0)


def test_what_is_not_finite_shows():
    assert polar(torch.tensor([[math.nan, 1.0, 2.0], [1.0, 1.0, 3.0]])).isnan().all()
    assert polar(torch.tensor([[math.inf, 1.0, 2.0], [1.0, 1.0, 3.0]])).isnan().all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_bfloat16(shape):
    """Products in bfloat16, as on CUDA: singular values end near 1, also where one direction has nearly all."""
    values = torch.tensor([1.0, 1e-2, 1e-2, 5e-3, 3e-3, 2e-3]).double()
    for matrix, expected in ((normal(*shape), None), with_singular_values(*shape, values)):
        matrix = (matrix / matrix.abs().max()).float()
        found = torch.linalg.svdvals(newton_schulz(matrix, 6, torch.bfloat16))
        assert found.min() > 0.8 and found.max() < 1.2
        if expected is None:
            near(newton_schulz(matrix, 6, torch.bfloat16), polar(matrix, None), 0.08)
    assert polar(normal(*shape).bfloat16()).dtype == torch.bfloat16


def test_many_at_once_mapped_and_compiled():
    matrices = normal(4, 6, 9)
    expected = torch.stack([polar(matrix) for matrix in matrices])
    near(polar(matrices), expected, 1e-12)
    near(vmap(polar)(matrices), expected, 1e-12)
    near(traced(polar)(matrices), expected, 1e-12)


def test_polynomials_are_the_nearest_to_1_on_the_interval_that_is_left():
    """The error has the same size at four places, with signs in turn: then no odd polynomial of degree 5 is nearer."""
    low, high = LOWEST, 1.0
    for a, b, c in COEFFICIENTS[:6]:
        turning = [math.sqrt((-3 * b + s * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c)) for s in (-1, 1)]
        errors = [1 - (a * x + b * x**3 + c * x**5) for x in (low, *turning, high)]
        size = errors[0]
        assert low < turning[0] < turning[1] < high
        assert errors == pytest.approx([size, -size, size, -size], rel=1e-4, abs=1e-8)
        low, high = 1 - size, 1 + size
    assert size < 1e-3
    # Newton and Schulz: errors e become those of the third order, as value and two derivatives at 1 are 1, 0, 0.
    a, b, c = COEFFICIENTS[6]
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1, 0, 0)


@pytest.mark.parametrize("matrix", [torch.ones(3), 1.0, torch.ones(2, 2, dtype=torch.int64)], ids=str)
def test_what_is_no_matrix_is_refused(matrix):
    with pytest.raises((TypeError, ValueError), match="matrix: expected a"):
        polar(matrix)
