"""Roots, inverses and determinants against extended precision, at the condition numbers that are promised."""

import itertools
from functools import partial

import numpy as np
import optree
import pytest
import torch
from torch.func import jacfwd, vmap

from lrkfac.linalg import (
    Dense,
    Diagonal,
    Kronecker,
    LowRankPlusDiagonal,
    LowRankPlusIsotropic,
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
from lrkfac.testing.laws import float64
from tests import extended
from tests.compiling import traced
from tests.dispatch import PeakMemory
from tests.tensors import close, normal

slow = partial(pytest.param, marks=pytest.mark.slow)


def eigenvalues(n, condition):
    return torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)


def basis(d, r, seed):
    return torch.linalg.qr(normal(d, r, seed=seed)).Q


def dense(d, condition, seed):
    vectors = basis(d, d, seed)
    matrix = (vectors * eigenvalues(d, condition)) @ vectors.mT
    return Dense((matrix + matrix.mT) / 2)


def low_rank(d, condition, seed, signs=1.0):
    """With ``signs``, some values are negative or 0, and two are equal."""
    rest = (1 + normal(d, seed=seed + 1).square()) / condition
    return LowRankPlusDiagonal(normal(d, 4, seed=seed) / d**0.5, eigenvalues(4, condition) * signs, rest)


def isotropic(d, condition, seed):
    *values, rest = eigenvalues(5, condition)
    return LowRankPlusIsotropic(basis(d, 4, seed), torch.stack(values), rest)


def either_sign(d, condition, seed):
    vectors, values, rest = low_rank(d, condition, seed, torch.tensor([1.0, -0.2, 0.0, 1.0]).double())
    return LowRankPlusDiagonal(vectors, values, rest - (vectors.square() * values.clamp(max=0)).sum(dim=1) * d)


FACTORS = {
    "isotropic": isotropic,
    "low rank": low_rank,
    "either sign": either_sign,
    "dense": dense,
    "diagonal": lambda d, condition, seed: Diagonal(eigenvalues(d, condition)),
}
PAIRS = [pair for pair in itertools.product(FACTORS, FACTORS) if "either sign" not in pair]
EXACT = [pair for pair in PAIRS if pair != ("low rank", "low rank")]
each_pair = pytest.mark.parametrize("output, input", EXACT, ids=[" x ".join(pair) for pair in EXACT])


def product(output, input, condition, seed=0, sizes=(5, 6)):
    return Kronecker(*[FACTORS[kind](d, condition, seed) for kind, d in zip((output, input), sizes, strict=True)])


CASES = {kind: lambda condition, make=make: make(20, condition, 0) for kind, make in FACTORS.items()}
CASES |= {" x ".join(pair): lambda condition, pair=pair: product(*pair, condition**0.5) for pair in PAIRS}


def squared(half):
    half = extended.wide(float64(half).to_dense())
    return half @ half.T


@extended.needs_more_than_float64
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_roots_and_determinants(case, dtype):
    """To 1e-9 at a condition number of 1e8 in float64; in float32 at 1e4."""
    exact = dtype == torch.float64
    operator = optree.tree_map(lambda x: x.to(dtype), CASES[case](1e8 if exact else 1e4))
    matrix = extended.matrix(operator)
    inverted = extended.inverse(matrix)
    assert extended.error(squared(root(operator)), matrix) <= (1e-14 if exact else 1e-6)
    assert extended.error(squared(inverse_root(operator)), inverted) <= (1e-9 if exact else 1e-4)
    assert extended.error(float64(inverse(operator)).to_dense(), inverted) <= (1e-9 if exact else 1e-4)
    assert extended.error(logdet(operator), extended.logdet(matrix)) <= (1e-11 if exact else 1e-5)


@extended.needs_more_than_float64
@each_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_exactly_damped_products(output, input, dtype):
    exact = dtype == torch.float64
    share = 1e-8 if exact else 1e-4
    plain = optree.tree_map(lambda x: x.to(dtype), product(output, input, 1e6 if exact else 1e2))
    operator = damped(plain, share)
    matrix = extended.matrix(plain)
    matrix = matrix + share * np.eye(len(matrix))
    inverted = extended.inverse(matrix)
    assert extended.error(float64(operator).to_dense(), matrix) <= (1e-14 if exact else 2e-6)
    for found in (squared(inverse_root(operator)), float64(inverse(operator)).to_dense()):
        assert extended.error(found, inverted) <= (1e-9 if exact else 4e-4)
    assert extended.error(logdet(operator), extended.logdet(matrix)) <= (1e-11 if exact else 5e-5)
    assert extended.error(float64(inverse(plain, share, exact=True)).to_dense(), inverted) <= (1e-9 if exact else 4e-4)


@pytest.mark.parametrize("case", ["low rank", "either sign"])
def test_the_inverse_of_an_inverse(case):
    """What is left of its entries, 1e-8 of them, is as wrong as they are rounded: no more can be asked."""
    operator = CASES[case](1e8)
    twice = inverse(inverse(operator))
    assert extended.error(to_dense(twice), extended.matrix(operator)) <= 1e-6
    assert abs(float(logdet(inverse(operator)) / logdet(operator)) + 1) <= 1e-9


# What an operator, vectors for it and a number make: each is one number or tensor.
FUNCTIONS = {
    "root": lambda op, x, c: root(op).matvec(x),
    "root transposed": lambda op, x, c: root(op).rmatvec(x[:, 0]),
    "inverse root": lambda op, x, c: inverse_root(op).matvec(x),
    "sample": lambda op, x, c: sample(op, x),
    "solve": lambda op, x, c: solve(op, x),
    "logdet": lambda op, x, c: logdet(op),
    "of the inverse": lambda op, x, c: quadratic_form(inverse(op, c), x),
    "damped": lambda op, x, c: logdet(damped(op, c)),
    "entries": lambda op, x, c: trace(op) + diagonal(scale(op, c)),
}
OPERATORS = {kind: make(6, 10.0, 3) for kind, make in FACTORS.items()}
OPERATORS["a product"] = product("low rank", "dense", 10.0)
OPERATORS["in both bases"] = damped(product("isotropic", "dense", 10.0), 0.1)
OPERATORS["in eigenspaces"] = damped(product("low rank", "dense", 10.0), 0.1)
OPERATORS["transposed"] = inverse(product("dense", "low rank", 10.0), 0.1, exact=True)


def everything(op, x, c):
    return {name: function(op, x, c) for name, function in FUNCTIONS.items()}


@pytest.mark.parametrize("operator", OPERATORS)
def test_mapped(operator):
    pair = OPERATORS[operator], scale(OPERATORS[operator], 1.7)
    x, c = normal(2, pair[0].dimension, 3), torch.tensor([0.3, 0.7]).double()
    found = vmap(everything)(optree.tree_map(lambda *x: torch.stack(x), *pair), x, c)
    for i, one in enumerate(zip(pair, x, c, strict=True)):
        close({name: each[i] for name, each in found.items()}, everything(*one), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", ["dense", slow("in both bases"), slow("transposed")])
def test_compiled(operator):
    """All functions in one graph."""
    arguments = OPERATORS[operator], normal(OPERATORS[operator].dimension, 3), torch.tensor(0.3).double()
    close(traced(everything)(*arguments), everything(*arguments))


ZEROS = LowRankPlusDiagonal(torch.eye(6)[:, :3].double(), torch.tensor([1.0, 0.0, 0.0]).double(), normal(6).square())
PLAIN = {
    "low rank": OPERATORS["low rank"],
    "either sign": OPERATORS["either sign"],
    "values of zero": ZEROS,
    "dense": Dense(torch.diag(torch.tensor([1.0, 1.0, 2.0]).double())),
    "isotropic x dense": product("isotropic", "dense", 10.0),
    "low rank x dense": Kronecker(ZEROS, dense(4, 10.0, 0)),
}


@pytest.mark.parametrize("plain", PLAIN)
def test_derivatives_in_damping_and_scale(plain):
    """Of determinants, samples of the inverse and quadratic forms; with equal eigenvalues, too, and forward."""
    operator, arguments = PLAIN[plain], [torch.tensor(x).double().requires_grad_() for x in (0.3, 2.0)]
    x, decomposed = normal(operator.dimension), damped(operator, 0.0)

    def evidence(damping, factor):
        total = damped(scale(decomposed, factor), damping)
        return logdet(total), inverse_root(total).matvec(x), quadratic_form(inverse(total), x), solve(total, x)

    assert torch.autograd.gradcheck(evidence, arguments)
    once = damped(scale(operator, 2.0), arguments[0])
    for found, expected in zip((logdet(once), solve(once, x)), evidence(*arguments)[::3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (backward,) = torch.autograd.grad(evidence(*arguments)[0], arguments[:1])
    forward = jacfwd(lambda damping: evidence(damping, 2.0)[0])(arguments[0].detach())
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_memory_of_a_large_operator():
    """Dimension 65 536, rank 64, float64: less than 2 GiB with the operator itself, and no square matrix."""
    d, r = 65_536, 64
    with PeakMemory() as memory:
        vectors = torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / d**0.5
        operator = LowRankPlusDiagonal(vectors, torch.ones(r).double(), torch.full((d,), 0.1).double())
        x = torch.ones(d, dtype=torch.float64)
        product, solution = (half.matvec(half.rmatvec(x)) for half in (root(operator), inverse_root(operator)))
        torch.testing.assert_close(product, operator.matvec(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(operator.matvec(solution), x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inverse(operator).matvec(x), solution, rtol=1e-9, atol=1e-9)
        assert logdet(operator).isfinite() and diagonal(operator).amin() > 0
    assert memory.peak <= 2 * 2**30
