"""Damped equations with a kernel."""

import pytest
import torch

from lrkfac.core.linalg.kernels import FLOOR, solve_damped
from tests.compiling import traced
from tests.tensors import close, normal


@pytest.mark.parametrize("damping", [1.0, 1e-6])
def test_equals_the_dense_solution(damping):
    rows, b = normal(7, 20), normal(7, seed=1)
    expected = torch.linalg.solve(rows @ rows.mT + damping * torch.eye(7, dtype=b.dtype), b)
    close(solve_damped(rows @ rows.mT, torch.tensor(damping), b), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_a_singular_kernel_has_a_solution_at_any_damping(rank, scale, dtype):
    """Also where no damping would be left after rounding, and examples stand there several times."""
    rows = (scale * normal(60, rank)).to(dtype).repeat(3, 1)
    b = rows @ torch.ones(rank, dtype=dtype)
    kernel = rows @ rows.mT
    x = solve_damped(kernel, torch.tensor(1e-300, dtype=torch.float64), b)
    assert x.isfinite().all()
    error = (kernel @ x - b).norm() / b.norm()
    assert error < 100 * FLOOR * torch.finfo(dtype).eps * kernel.diagonal().sum() / torch.linalg.svdvals(rows)[-1] ** 2


def test_of_zeros_the_damping_remains():
    close(solve_damped(torch.zeros(3, 3), torch.tensor(0.5), torch.ones(3)), torch.full((3,), 2.0))


def test_mapped_and_traced():
    rows, b, dampings = normal(5, 3), normal(5, seed=1), torch.tensor([0.1, 1.0], dtype=torch.float64)
    kernel = rows @ rows.mT
    each = torch.stack([solve_damped(kernel, damping, b) for damping in dampings])
    close(torch.func.vmap(lambda damping: solve_damped(kernel, damping, b))(dampings), each)
    close(traced(solve_damped)(kernel, dampings[0], b), each[0])
