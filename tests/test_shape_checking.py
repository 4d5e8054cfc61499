"""The checks of shapes: they are on, raise, and are invisible to vmap and the compiler."""

import sys
import textwrap
from functools import partial
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.func import grad, vmap

from lrkfac.linalg import Diagonal
from tests.shape_checking import check_shapes

CORE = """
    from __future__ import annotations
    from typing import NamedTuple
    from jaxtyping import Float
    from torch import Tensor

    class Scaling(NamedTuple):
        scale: Tensor

        def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
            return (self.scale * x.mT).mT if x.ndim > 1 else self.scale * x

    def square(x: Float[Tensor, "d d"], power: float = 1.0) -> Float[Tensor, "d d"]:
        return x * power

    def add(x: Float[Tensor, "d"], y: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        if y.ndim > 1:
            raise ValueError("y: expected a vector")
        return x + y

    def unannotated(x):
        return x
"""
USER = "from toy_package.core.algebra import Scaling, add, square, unannotated"


def energy(user, operator, x):
    return (user.add(x, operator.matvec(user.unannotated(x))) * x).sum()


@pytest.fixture(scope="module")
def toy():
    """A package with the layout of ours: core, and a module that imports from it."""
    texts = {"toy_package": "", "toy_package.core": "", "toy_package.core.algebra": CORE, "toy_package.user": USER}
    with pytest.MonkeyPatch.context() as patch:
        for name, text in texts.items():
            module = ModuleType(name)
            module.__path__ = []
            patch.setitem(sys.modules, name, module)
            exec(textwrap.dedent(text), vars(module))
        checked = check_shapes("toy_package", checked_within="toy_package.core")
        yield sys.modules["toy_package.user"], checked


def test_a_wrong_shape_raises_also_where_the_function_was_imported_to(toy):
    user, checked = toy
    assert checked == [f"toy_package.core.algebra.{name}" for name in ("Scaling.matvec", "add", "square")]
    for match, call in (
        ("parameter 'y'", lambda: user.add(torch.ones(3), torch.ones(1))),
        ("parameter 'x'", lambda: user.Scaling(torch.ones(())).matvec(torch.ones(()))),
        ("return value", lambda: user.Scaling(torch.ones(2, 3)).matvec(torch.ones(3))),
        ("parameter 'x'", lambda: user.square(torch.ones(2, 3))),
        ("parameter 'y'", lambda: vmap(user.add)(torch.rand(5, 3), torch.rand(5, 1))),
        ("return value", lambda: Diagonal(torch.ones(3)).matvec(torch.ones(1))),  # of the package itself
    ):
        with pytest.raises(TypeCheckError, match=match):
            call()
    assert user.square(torch.ones(2, 2), 3).sum() == 12
    with pytest.raises(ValueError, match="y: expected a vector"):  # its own refusal is seen
        user.add(torch.ones(3), torch.ones(3, 1))
    with pytest.raises(RuntimeError, match="no function"):
        check_shapes("toy_package", checked_within="toy_package.user")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_works_under_vmap_grad_and_the_compiler(toy, compiled):
    step = vmap(grad(partial(energy, toy[0]), argnums=1))
    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    operators, x = toy[0].Scaling(torch.rand(5, 3)), torch.rand(5, 3)
    torch.testing.assert_close(step(operators, x), 2 * x * (1 + operators.scale))


@given(st.integers(0, 3))
def test_each_example_starts_from_the_same_random_numbers(_):
    torch.testing.assert_close(torch.rand(()), torch.rand((), generator=torch.Generator().manual_seed(0)))
