"""The checks of shapes: they are on, raise, and are invisible to vmap and the compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.func import grad, vmap

from lrkfac import linalg
from lrkfac.core.curvature import iterated
from lrkfac.linalg import Diagonal
from tests.shape_checking import check_shapes


def test_a_wrong_shape_raises_also_where_the_function_was_imported_to():
    for match, call in (
        ("return value", lambda: Diagonal(torch.ones(3)).matvec(torch.ones(1))),
        ("return value", lambda: Diagonal(torch.ones(2, 3)).matvec(torch.ones(3))),
        ("parameter 'x'", lambda: Diagonal(torch.ones(())).of_rows(torch.ones(()))),
        ("parameter 'projected'", lambda: iterated.ritz(torch.ones(2, 3))),
        ("return value", lambda: vmap(Diagonal.matvec)(Diagonal(torch.rand(5, 3)), torch.rand(5, 1))),
    ):
        with pytest.raises(TypeCheckError, match=match):
            call()
    with pytest.raises(ValueError, match="start: expected vectors"):  # the package's own refusal is seen
        linalg.power_iteration(lambda v: v, torch.ones(3), 1)
    with pytest.raises(RuntimeError, match="no function"):
        check_shapes("lrkfac", checked_within="lrkfac.schedules")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_works_under_vmap_grad_and_the_compiler(compiled):
    step = vmap(grad(lambda operator, x: (operator.matvec(x) * x).sum(), argnums=1))
    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    operators, x = Diagonal(torch.rand(5, 3)), torch.rand(5, 3)
    torch.testing.assert_close(step(operators, x), 2 * x * operators.diagonal)


@given(st.integers(0, 3))
def test_each_example_starts_from_the_same_random_numbers(_):
    torch.testing.assert_close(torch.rand(()), torch.rand((), generator=torch.Generator().manual_seed(0)))
