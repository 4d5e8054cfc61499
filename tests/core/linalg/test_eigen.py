"""Iterations: orthonormal whatever happens, right where they had time enough; under vmap: laws of structures."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.core.linalg.bases import pseudo_random
from lrkfac.core.linalg.eigen import Eigenpairs, rayleigh_ritz, ritz_of_all
from lrkfac.linalg import power_iteration, subspace_iteration
from lrkfac.testing import dtypes, seeds
from tests.dispatch import Launches
from tests.tensors import normal

BOTH = pytest.mark.parametrize("iterate", [power_iteration, subspace_iteration])


def symmetric(values, seed=0):
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return (basis * torch.as_tensor(values, dtype=torch.float64)) @ basis.mT, basis


def assert_orthonormal(vectors):
    gram = vectors.mT @ vectors
    error = (gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max()
    assert error <= 20 * torch.finfo(vectors.dtype).eps * vectors.shape[0] ** 0.5


@BOTH
@given(seeds, st.integers(1, 12), st.integers(1, 12), dtypes)
def test_vectors_are_orthonormal_whatever_ended_the_iteration(iterate, seed, d, r, dtype):
    r = min(r, d)
    generator = torch.Generator().manual_seed(seed)
    # Indefinite, with zero and repeated eigenvalues and a start that may be zero or dependent.
    values = torch.randint(-2, 3, (d,), generator=generator).double()
    matrix = symmetric(values, seed)[0].to(dtype)
    starts = [torch.randn(d, r, generator=generator, dtype=torch.float64), torch.zeros(d, r), torch.ones(d, r)]
    for start in [s.to(dtype) for s in starts] + [symmetric(values, seed)[1][:, :r].flip(1).to(dtype)]:
        for steps in (1, 20):
            vectors, found = iterate(lambda v: matrix @ v, start, r, steps)
            assert vectors.shape == (d, r) and found.shape == (r,) and vectors.dtype == found.dtype == dtype
            assert_orthonormal(vectors)
            assert (found.abs().diff() <= 1e-6 * found.abs().max()).all()


@BOTH
@pytest.mark.parametrize("values", [[-5, 4, -3, 2, 0.1, 0], [3, 3, 3, 1, 1, 0], [2, -2, 1, 0, 0, 0]])
def test_eigenpairs_of_largest_magnitude(iterate, values):
    matrix, _ = symmetric(values)
    start = pseudo_random(6, 3, torch.tensor(1)).double()
    vectors, found = iterate(lambda v: matrix @ v, start, 3, 300)
    expected = torch.tensor(sorted(values, key=lambda x: -abs(x))[:3], dtype=torch.float64)
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix @ vectors, vectors * found, rtol=1e-4, atol=1e-4)


@BOTH
def test_a_warm_start_needs_one_step(iterate):
    matrix, basis = symmetric([9, 7, 5, 3, 1, 0.5])
    _, values = iterate(lambda v: matrix @ v, basis[:, :3] + 1e-3 * torch.randn(6, 3).double(), 3, 1)
    torch.testing.assert_close(values, torch.tensor([9.0, 7, 5], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_tolerance_stops_a_vector_that_no_longer_turns(tolerance):
    matrix, basis = symmetric([2, 1.8, 0.1, 0])
    start = (basis[:, :1] + 0.3 * basis[:, 1:2]).double()
    vector, _ = power_iteration(lambda v: matrix @ v, start, max_iterations=500, tolerance=tolerance)
    sine = (basis[:, 1] @ vector[:, 0]).abs()
    # The error of the vector is at most the last turn over 1 - the ratio of the eigenvalues.
    assert tolerance * 0.5 < sine < 10 * tolerance


def test_what_is_left_of_units_that_died_is_no_harm():
    """Of such a matrix, with subnormal numbers in it, LAPACK's eigh makes NaN."""
    matrix = torch.zeros(7, 7)
    matrix[:5, :5] = torch.tensor(
        [
            [5.9256960e-02, 2.3974324e-04, -1.1479155e-09, 1.1492324e-10, -1.7898391e-25],
            [2.3974324e-04, 1.3238668e-02, -1.4405432e-10, 2.0533908e-11, 2.0304936e-26],
            [-1.1479155e-09, -1.4405432e-10, 2.3705385e-17, -2.4376250e-18, 3.2875737e-33],
            [1.1492324e-10, 2.0533908e-11, -2.4376250e-18, 2.5330817e-19, -3.2180196e-34],
            [-1.7898391e-25, 2.0304936e-26, 3.2875737e-33, -3.2180196e-34, 2.8621221e-36],
        ]
    )
    subnormal = torch.tensor([3.643376e-44, 2.3822074e-44])
    matrix[1, 5:], matrix[5:, 1] = subnormal, subnormal
    matrix[5:, 5:] = 1.4012985e-45 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    vectors, values = rayleigh_ritz(lambda v: matrix @ v, torch.eye(7), 7)
    assert_orthonormal(vectors)
    assert values.isfinite().all() and abs(values[0] - 0.059258) < 1e-6


def test_matrices_of_one_size_are_decomposed_together():
    """The eigenpairs of each leaf are its own, also of stacks, of no matrices, under ``vmap`` and in other dtypes."""
    one, stack, large = normal(3, 3), normal(2, 4, 3, 3), normal(5, 5)
    tree = [{"a": one, "b": ()}, (stack, large, normal(3, 3).float())]

    def checked(projections, found):
        for matrix, pairs in zip(optree.tree_leaves(projections), leaves_of(found), strict=True):
            assert pairs.vectors.shape == matrix.shape and pairs.values.shape == matrix.shape[:-1]
            whole = (pairs.vectors * pairs.values[..., None, :]) @ pairs.vectors.mT
            torch.testing.assert_close(whole, (matrix + matrix.mT) / 2)

    leaves_of = lambda x: optree.tree_leaves(x, is_leaf=lambda y: isinstance(y, Eigenpairs))  # noqa: E731
    with Launches() as counted:
        checked(tree, ritz_of_all(tree))
    assert counted.kernels["_linalg_eigh"] == 3
    many = optree.tree_map(lambda x: torch.stack([x, 2 * x]), tree)
    checked(many, vmap(ritz_of_all)(many))
    assert ritz_of_all([(), ()]) == [(), ()]
