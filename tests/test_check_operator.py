"""``check_operator`` passes the package's operators and names each way of being wrong."""

import optree
import pytest
import torch
from hypothesis import given, settings

from lrkfac.linalg import Dense, Kronecker, LowRankPlusDiagonal, damped, inverse
from lrkfac.testing import check_operator, operators
from tests.core.linalg.test_custom import ONE, Multiple
from tests.core.linalg.test_square_roots import each_pair, product


@settings(max_examples=20)
@given(operators(10, torch.float64, 1e6) | operators(10, torch.float32, 1e3))
def test_operators(operator):
    """Damped by a share of their largest eigenvalue, which makes them definite."""
    largest = float(torch.linalg.matrix_norm(operator.to_dense().double(), 2))
    share = (1e-6 if optree.tree_leaves(operator)[0].dtype == torch.float64 else 1e-3) * (largest or 1.0)
    both = isinstance(operator, Kronecker) and all(isinstance(x, LowRankPlusDiagonal) for x in operator)
    check_operator(damped(operator, share, exact=not both), damping=share)


@each_pair
def test_products_of_every_pair(output, input):
    plain = product(output, input, 10.0)
    for operator in (plain, damped(plain, 0.1), inverse(plain, 0.1, exact=True)):
        check_operator(operator)


WRONG = {
    "matvec": (lambda self, x: 1.01 * self.c * x, "matvec = to_dense @ x"),
    "trace": (lambda self: self.c, "trace"),
    "diagonal": (lambda self: self.c + torch.arange(3.0), "diagonal"),
    "scale": (lambda self, c: self, "scale"),
    "shifted": (lambda self, c: self, r"damped = M \+ damping I"),
    "root": (lambda self: self, "root: S Sᵀ = M"),
    "inverse_root": (lambda self: Multiple.root(self), "inverse_root: S Sᵀ = M⁻¹"),
    "solve": (lambda self, b: b, "solve = M⁻¹ b"),
    "sample": (lambda self, noise: noise, "sample = S noise"),
    "logdet": (lambda self: self.c.log(), "logdet"),
    "inverse": (lambda self, damping, exact: self, "inverse = dense inverse"),
    "quadratic_form": (lambda self, x: x.sum(dim=0), "quadratic_form = xᵀ M x"),
}


@pytest.mark.parametrize(("method", "function", "law"), [(name, *x) for name, x in WRONG.items()], ids=WRONG)
def test_what_is_wrong_is_named(method, function, law):
    wrong = type("Wrong", (Multiple,), {method: function})
    with pytest.raises(AssertionError, match=f"law broken: {law}"):
        check_operator(wrong(*ONE))


def test_an_operator_that_is_not_positive_definite():
    with pytest.raises(AssertionError, match=r"law broken: positive definite: the smallest eigenvalue is -1\.00e\+00"):
        check_operator(Dense(-torch.eye(2)))


def test_an_operator_that_is_changed():
    def trace(self):
        self.like.add_(1e-9)
        return self.c * 3

    with pytest.raises(AssertionError, match="law broken: the functions leave the operator unchanged"):
        check_operator(type("Wrong", (Multiple,), {"trace": trace})(ONE.c, ONE.like.clone()))
