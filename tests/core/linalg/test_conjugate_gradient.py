"""Conjugate gradients: the dense solution, by how many products, whatever the arguments are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.linalg import Dense, Diagonal, conjugate_gradient
from lrkfac.testing import seeds
from tests.compiling import traced
from tests.core.linalg.test_eigen import symmetric
from tests.tensors import close, normal

MATRIX = symmetric([1.0, 1.0, 2.0, 2.0, 2.0, 5.0])[0]
B = normal(6, seed=1)


@settings(max_examples=15)
@given(seeds, st.integers(1, 20), st.sampled_from([0.0, 0.1]))
def test_the_solution_is_the_dense_one(seed, d, damping):
    factor = normal(d, d, seed=seed)
    matrix, b = factor @ factor.mT + 0.01 * torch.eye(d).double(), normal(d, seed=seed + 1)
    found = conjugate_gradient(lambda x: matrix @ x, b, damping=damping, tolerance=1e-11)
    damped = matrix + damping * torch.eye(d).double()
    close(found.solution, torch.linalg.solve(damped, b), rtol=1e-6, atol=1e-6)
    true = torch.linalg.vector_norm(b - damped @ found.solution) / torch.linalg.vector_norm(b)
    assert found.relative_residual <= 1e-11 and true <= 1e-9


def test_products_are_the_number_of_distinct_eigenvalues_and_one_with_the_inverse():
    counts = {}
    for name, preconditioner in {"none": None, "inverse": Dense(torch.linalg.inv(MATRIX))}.items():
        calls = []
        found = conjugate_gradient(lambda x, calls=calls: calls.append(x) or MATRIX @ x, B, preconditioner)
        counts[name] = int(found.products)
        assert len(calls) == counts[name]
    assert counts == {"none": 3, "inverse": 1}


def test_trees_starts_and_zero():
    tree = {"a": B[:2].reshape(2, 1), "b": (B[2:],)}

    def product(x):
        y = MATRIX @ torch.cat([x["a"].flatten(), x["b"][0]])
        return {"a": y[:2].reshape(2, 1), "b": (y[2:],)}

    whole, found = conjugate_gradient(Dense(MATRIX), B), conjugate_gradient(product, tree)
    close(torch.cat([found.solution["a"].flatten(), found.solution["b"][0]]), whole.solution)
    again = conjugate_gradient(product, tree, start=found.solution)
    assert int(again.products) == 1 and again.relative_residual <= 1e-6
    none = conjugate_gradient(Dense(MATRIX), torch.zeros(6))
    assert not none.solution.any() and int(none.products) == 0 and none.relative_residual == 0


def test_an_indefinite_matrix_ends_it_and_the_residual_tells():
    found = conjugate_gradient(Diagonal(torch.tensor([1.0, -1.0])), torch.ones(2))
    assert found.solution.isfinite().all() and found.relative_residual > 0.1 and int(found.products) == 1


def test_under_vmap_and_compile_what_is_done_stands_still():
    b = torch.stack([B, torch.zeros(6).double(), MATRIX[0]])

    def solve(b):
        return conjugate_gradient(Dense(MATRIX), b, max_iterations=8)

    each = [solve(one) for one in b]
    found = vmap(solve)(b)
    close(found.solution, torch.stack([one.solution for one in each]), atol=1e-8)
    assert found.products.tolist() == [int(one.products) for one in each]


@pytest.mark.slow
def test_compiles_whole():
    def solve(b):
        return conjugate_gradient(Dense(MATRIX), b, Diagonal(1 / MATRIX.diagonal()), 0.1, max_iterations=2)

    close(traced(solve)(B).solution, solve(B).solution, atol=1e-8)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="operator: expected one of dimension 3, as the vector, got 6"):
        conjugate_gradient(Dense(MATRIX), B[:3])
    with pytest.raises(ValueError, match=r"preconditioner: expected a product of the shape of the vector, \(6,\)"):
        conjugate_gradient(Dense(MATRIX), B, preconditioner=lambda r: r[:3])
