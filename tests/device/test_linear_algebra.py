"""Operators, their inverses and structures on the device: the laws of ``lrkfac.testing``."""

import optree
import pytest
import torch
from hypothesis import given, settings

from lrkfac.core.base.dtypes import most_precise
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.linalg import inverse, polar, power_iteration, sherman_morrison, subspace_iteration, to_dense, woodbury
from lrkfac.structures import kronecker, low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_inverse, check_operator, check_structure, low_rank_plus_diagonals, operators
from tests.core.curvature.test_low_rank import STRUCTURES
from tests.device.moving import close, moved, on_device
from tests.tensors import normal


@settings(max_examples=15)
@given(operator=operators(12) | low_rank_plus_diagonals(12))
def test_inverses(device, operator):
    if optree.tree_leaves(operator)[0].dtype in (torch.float32, most_precise(device)):
        there = moved(operator, device)
        check_inverse(there, 0.1)
        assert on_device((inverse(there, 0.1), to_dense(there), there.trace()), device)


@settings(max_examples=15)
@given(operator=operators(12, torch.float32, 1e2))
def test_functions_of_operators(device, operator):
    """The share of the largest eigenvalue that is added makes them definite."""
    largest = float(torch.linalg.matrix_norm(to_dense(operator), 2)) or 1.0
    check_operator(moved(operator.shifted(largest / 100), device))


@settings(max_examples=10)
@given(operator=low_rank_plus_diagonals(12, torch.float32, 1e4))
def test_both_formulas_are_those_of_the_cpu(device, operator):
    expected = torch.linalg.inv(to_dense(optree.tree_map(torch.Tensor.double, operator)))
    for invert in (woodbury, sherman_morrison):
        close(to_dense(invert(moved(operator, device))), expected, 2e-2)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 8, 5)], ids=str)
def test_polar_factors(device, dtype, shape):
    """On CUDA, those of float32 come from products in bfloat16."""
    matrix, rounded = normal(*shape), device.type == "cuda" and dtype == torch.float32
    for iterations, error in ((9, 0.1 if rounded else 1e-4), (None, 1e-4)):
        found = polar(matrix.to(device, dtype), iterations)
        assert on_device(found, device) and found.dtype == dtype
        close(found, polar(matrix, None), error)


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_structures(device, dtype, make):
    check_structure(make(3), 8, dtype=dtype, device=device)


def test_corrected_products(device, dtype):
    check_structure(kronecker(low_rank(2), low_rank_plus_diagonal(2), corrected=True), 6, dtype=dtype, device=device)
    parts = normal(5, 3), normal(4, 2), normal(3, 2).abs(), normal(3).abs(), normal(2).abs(), normal().abs()
    bases = [torch.linalg.qr(x).Q for x in parts[:2]]
    here = EigenbasisKronecker(*bases, *parts[2:])
    there = moved(here, device, dtype)
    close(to_dense(there), to_dense(here), 100 * torch.finfo(dtype).eps)
    close(there.matvec(moved(normal(20), device, dtype)), to_dense(here) @ normal(20), 100 * torch.finfo(dtype).eps)


def test_iterations_are_those_of_the_cpu(device, dtype):
    matrix, start = torch.diag(normal(4).abs()) + 0.1, normal(4, 2)
    there = moved((matrix, start), device, dtype)
    for find in (power_iteration, subspace_iteration):
        found, expected = (
            find(lambda x, matrix=matrix: matrix @ x, start, 2) for matrix, start in (there, (matrix, start))
        )
        assert on_device(found, device)
        close(found[1], expected[1], 1e3 * torch.finfo(dtype).eps)
