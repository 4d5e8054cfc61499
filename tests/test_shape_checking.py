"""The checks of shapes: they are on, raise, and are invisible to vmap and the compiler."""

import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.func import grad, vmap

from lrkfac.core.linalg.eigen import orthonormal
from lrkfac.linalg import Diagonal
from tests.shape_checking import check_shapes

CORE = """
    from __future__ import annotations

    from dataclasses import dataclass
    from typing import NamedTuple

    from jaxtyping import Float
    from torch import Tensor

    class Scaling(NamedTuple):
        scale: Tensor

        def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
            return (self.scale * x.mT).mT if x.ndim > 1 else self.scale * x

        @property
        def wrong(self) -> Float[Tensor, "1 d"]:
            return self.scale

        @staticmethod
        def square(x: Float[Tensor, "d d"], power: float = 1.0) -> Float[Tensor, "d d"]:
            return x * power

    @dataclass(frozen=True)
    class Held:
        rows: Float[Tensor, "n d"]

        def trace(self) -> Float[Tensor, ""]:
            return self.rows.square().sum()

    def add(x: Float[Tensor, "d"], y: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        if y.ndim > 1:
            raise ValueError("y: expected a vector")
        return x + y

    def unannotated(x):
        return x
"""
USER = """
    from toy_package.core.algebra import Scaling, add, unannotated

    def energy(operator, x):
        return (add(x, operator.matvec(x)) * x).sum()
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A package with the layout of ours: core, and a module that imports from it."""
    folder = tmp_path_factory.mktemp("toy")
    files = {"__init__.py": "", "core/__init__.py": "", "core/algebra.py": CORE, "user.py": USER}
    for name, text in files.items():
        path = folder / "toy_package" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    checked = check_shapes("toy_package", checked_within="toy_package.core")
    yield sys.modules["toy_package.user"], checked
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_package"]:
        del sys.modules[name]


def test_finds_what_has_shapes(toy):
    _, checked = toy
    names = ["Held.trace", "Scaling.matvec", "Scaling.square", "Scaling.wrong", "add"]
    assert checked == [f"toy_package.core.algebra.{name}" for name in names]


def test_a_wrong_shape_raises_also_where_the_function_was_imported_to(toy):
    user, _ = toy
    with pytest.raises(TypeCheckError, match="parameter 'y'"):
        user.add(torch.ones(3), torch.ones(1))
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        user.Scaling(torch.ones(())).matvec(torch.ones(()))
    with pytest.raises(TypeCheckError, match="return value"):
        user.Scaling(torch.ones(2, 3)).matvec(torch.ones(3))
    with pytest.raises(TypeCheckError, match="return value"):
        _ = user.Scaling(torch.ones(2)).wrong
    with pytest.raises(TypeCheckError):
        user.Scaling.square(torch.ones(2, 3))
    assert user.Scaling.square(torch.ones(2, 2), 3).sum() == 12


def test_the_packages_own_refusal_is_seen(toy):
    user, _ = toy
    with pytest.raises(ValueError, match="y: expected a vector"):
        user.add(torch.ones(3), torch.ones(3, 1))


def test_works_under_vmap_and_grad(toy):
    user, _ = toy
    operators, x = user.Scaling(torch.rand(5, 3)), torch.rand(5, 3)
    mapped = vmap(grad(user.energy, argnums=1))(operators, x)
    torch.testing.assert_close(mapped, 2 * x * (1 + operators.scale))
    with pytest.raises(TypeCheckError):
        vmap(user.add)(torch.rand(5, 3), torch.rand(5, 1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiler_traces_through(toy, backend):
    user, _ = toy

    def step(operators, x):
        return vmap(grad(user.energy, argnums=1))(operators, user.unannotated(x))

    operators, x = user.Scaling(torch.rand(5, 3)), torch.rand(5, 3)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(operators, x), step(operators, x))


def test_checks_that_would_check_nothing_are_an_error(toy):
    with pytest.raises(RuntimeError, match="no function"):
        check_shapes("toy_package", checked_within="toy_package.user")


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError):
        Diagonal(torch.ones(3)).matvec(torch.ones(1))
    with pytest.raises(TypeCheckError):
        orthonormal(torch.ones(3, 1, dtype=torch.int64))


@given(st.integers(0, 3))
def test_each_example_starts_from_the_same_random_numbers(_):
    torch.testing.assert_close(torch.rand(()), torch.rand((), generator=torch.Generator().manual_seed(0)))


def test_random_numbers_start_from_the_same_seed():
    test_each_example_starts_from_the_same_random_numbers.hypothesis.inner_test(0)
