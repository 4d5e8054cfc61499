"""Lanczos: the tridiagonal form, its exhaustion, and eigenpairs by block Krylov spaces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.linalg import Dense, eigenvalues, lanczos
from lrkfac.testing import seeds
from tests.core.linalg.test_eigen import assert_orthonormal, symmetric
from tests.tensors import close, normal


@settings(max_examples=15)
@given(seeds, st.integers(1, 15), st.integers(1, 15))
def test_the_matrix_is_tridiagonal_in_an_orthonormal_basis(seed, d, m):
    m = min(d, m)
    matrix, start = symmetric(normal(d, seed=seed), seed)[0], normal(d, seed=seed + 1)
    found = lanczos(Dense(matrix), start, m)
    assert_orthonormal(found.basis)
    close(found.basis.mT @ matrix @ found.basis, found.to_dense(), atol=1e-10)
    close(found.basis[:, 0], start / torch.linalg.vector_norm(start))
    if m == d:
        close(torch.linalg.eigvalsh(found.to_dense()), torch.linalg.eigvalsh(matrix), atol=1e-9)


def test_an_exhausted_space_leaves_zeros_and_trees_come_back_as_trees():
    matrix, vectors = symmetric([2.0, 2.0, 2.0, 5.0])
    tree = {"a": (vectors[:, 0] + vectors[:, 3]).reshape(2, 2)}
    found = lanczos(lambda x: {"a": (matrix @ x["a"].flatten()).reshape(2, 2)}, tree, 4)
    assert found.basis["a"].shape == (4, 2, 2)
    close(torch.linalg.eigvalsh(found.to_dense()), torch.tensor([0.0, 0, 2, 5]).double(), atol=1e-9)
    assert not found.basis["a"][2:].any() and not found.off_diagonal[1:].any()


def test_without_orthogonality_eigenvalues_come_again():
    matrix, start = symmetric(torch.arange(40.0).double() ** 4)[0], normal(40, seed=1)
    loose, tight = (lanczos(Dense(matrix), start, 40, reorthogonalize=x) for x in (False, True))
    largest = torch.linalg.eigvalsh(loose.to_dense())[-3:]
    assert (largest.diff() < 1).any()
    close(torch.linalg.eigvalsh(tight.to_dense()), torch.arange(40.0).double() ** 4, rtol=1e-6, atol=1e-5)


SPECTRUM = torch.cat([torch.linspace(-1, 1, 94), torch.tensor([9.0, 9.0, -8.0, 5.0, 5.0, 5.0])]).double()


@pytest.mark.parametrize("limit", [8, 30])
@pytest.mark.parametrize(
    ("which", "expected"),
    [("magnitude", [9.0, 9.0, -8.0]), ("largest", [9.0, 9.0, 5.0]), ("smallest", [-8.0])],
)
def test_extreme_eigenpairs_with_their_multiplicity(which, expected, limit):
    matrix, start = symmetric(SPECTRUM)[0], normal(100, 4, seed=2)
    found = eigenvalues(Dense(matrix), start, len(expected), which, 1e-9, max_vectors=limit, max_iterations=300)
    close(found.values, torch.tensor(expected).double(), atol=1e-7)
    assert_orthonormal(found.vectors)
    residuals = torch.linalg.vector_norm(matrix @ found.vectors - found.vectors * found.values, dim=0)
    close(residuals, found.residuals, atol=1e-11)
    assert residuals.max() <= 1e-9 * 9


@settings(max_examples=10)
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_all_eigenvalues_of_small_matrices_of_any_rank(seed, d, k):
    k = min(d, k)
    values = torch.randint(-2, 3, (d,), generator=torch.Generator().manual_seed(seed)).double()
    matrix = symmetric(values, seed)[0]
    stacked = {"x": normal(k, d, seed=seed + 1)}
    found = eigenvalues(lambda t: {"x": matrix @ t["x"]}, stacked)
    assert found.vectors["x"].shape == (k, d)
    expected = values.abs().sort(descending=True).values[:k]
    close(found.values.abs(), expected, atol=1e-5)


def test_eigenvalues_of_several_matrices_under_vmap():
    matrices = torch.stack([symmetric(SPECTRUM[-12:])[0], symmetric(-SPECTRUM[-12:], seed=1)[0]])

    start = normal(12, 3, seed=3)

    def largest(matrix):
        return eigenvalues(Dense(matrix), start, which="largest", max_iterations=8).values

    close(vmap(largest)(matrices), torch.stack([largest(m) for m in matrices]), atol=1e-7)
