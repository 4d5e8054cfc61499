"""Custom operators take part by their methods."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lrkfac.linalg import (
    Dense,
    Diagonal,
    Kronecker,
    damped,
    diagonal,
    inverse,
    inverse_root,
    logdet,
    quadratic_form,
    root,
    sample,
    scale,
    solve,
    to_dense,
    trace,
)
from lrkfac.testing import check_operator
from tests.tensors import normal


class Multiple(NamedTuple):
    """``c I``, with every method."""

    c: Tensor
    like: Tensor

    @property
    def dimension(self):
        return len(self.like)

    def matvec(self, x):
        return self.c * x

    def of_rows(self, x):
        return self.c * x

    def to_dense(self):
        return self.c * torch.eye(len(self.like), dtype=self.c.dtype)

    def trace(self):
        return self.c * len(self.like)

    def shifted(self, shift):
        return self._replace(c=self.c + shift)

    def diagonal(self):
        return self.c * torch.ones_like(self.like)

    def scale(self, c):
        return self._replace(c=c * self.c)

    def logdet(self):
        return len(self.like) * self.c.log()

    def root(self):
        return Multiple(self.c.sqrt(), self.like)

    def inverse_root(self):
        return Multiple(self.c.rsqrt(), self.like)

    def inverse(self, damping, exact):
        return Multiple(1 / (self.c + damping), self.like)

    rmatvec, shape = matvec, property(lambda self: (len(self.like), len(self.like)))


class Bare(NamedTuple):
    """An operator with nothing but products."""

    c: Tensor

    def matvec(self, x):
        return torch.diag(self.c) @ x

    def to_dense(self):
        return torch.diag(self.c)


ONE = Multiple(torch.tensor(3.0).double(), torch.ones(3).double())


def test_laws():
    check_operator(ONE)
    check_operator(Bare(torch.tensor([1.0, 2.0])))


def test_as_a_factor():
    """What its other factor's class knows of it is what its methods return."""
    operator, same = (
        Kronecker(ONE, Diagonal(normal(2).exp())),
        Kronecker(Dense(ONE.to_dense()), Diagonal(normal(2).exp())),
    )
    x = normal(6)
    for function in (logdet, trace, diagonal, to_dense):
        torch.testing.assert_close(function(operator), function(same))
    for function in (sample, solve, quadratic_form):
        torch.testing.assert_close(function(operator, x), function(same, x))
    torch.testing.assert_close(to_dense(scale(operator, 2.0)), 2 * to_dense(same))


FUNCTIONS = {
    "trace": trace,
    "diagonal": diagonal,
    "logdet": logdet,
    "root": root,
    "inverse_root": inverse_root,
    "scale": lambda op: scale(op, 2.0),
    "damped(.*) or shifted": lambda op: damped(op, 0.1),
    "sample(.*) or root": lambda op: sample(op, torch.ones(2)),
    "solve(.*) or inverse_root": lambda op: solve(op, torch.ones(2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_the_method(name):
    with pytest.raises(TypeError, match=rf"operator: expected .* a custom one with a method {name}\(\), got Bare"):
        FUNCTIONS[name](Bare(torch.ones(2)))
    with pytest.raises(TypeError, match="operator: expected one of lrkfac's operators, got Tensor"):
        FUNCTIONS[name](torch.ones(2, 2))


def test_exact_damping_needs_factors_of_the_package():
    for function in (damped, lambda *arguments: inverse(*arguments, exact=True)):
        with pytest.raises(TypeError, match="expected one of lrkfac's operators, got Multiple"):
            function(Kronecker(ONE, ONE), 0.1)
