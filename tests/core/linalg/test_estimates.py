"""Traces and diagonals: exact at low rank, without bias, and with an honest error."""

import pytest
import torch

from lrkfac.linalg import Dense, diagonal_estimate, trace_estimate
from tests.core.linalg.test_eigen import symmetric
from tests.tensors import close, normal

METHODS = ("xtrace", "hutch++", "hutchinson")
DECAYING = symmetric(0.8 ** torch.arange(60.0).double())[0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("values", [[3.0, -2.0, 1.0, *[0.0] * 17], [0.0] * 20])
def test_of_low_rank_they_are_exact(values):
    matrix = symmetric(values)[0]
    for method in METHODS[:2]:
        found = trace_estimate(Dense(matrix), 5, generator(), method=method)
        close(found.value, matrix.trace(), atol=1e-9)
        assert found.error <= 1e-9
    close(diagonal_estimate(Dense(matrix), 5, generator()).value, matrix.diagonal(), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_traces_have_no_bias_and_an_honest_error(method):
    """The mean of many, within four of its standard errors; the error within a factor of two, in the root mean."""
    matrix = DECAYING + 0.01 * symmetric(normal(60, seed=5), 6)[0]
    found = [trace_estimate(Dense(matrix), 8, generator(seed), method=method) for seed in range(200)]
    values, errors = torch.stack([x.value for x in found]), torch.stack([x.error for x in found])
    assert abs(values.mean() - matrix.trace()) <= 4 * values.std() / 200**0.5
    assert 0.4 <= errors.square().mean().sqrt() / values.std() <= 2.5
    assert int(found[0].products) == {"xtrace": 16, "hutch++": 24, "hutchinson": 8}[method]


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_diagonals_have_no_bias(method):
    found = [diagonal_estimate(Dense(DECAYING), 6, generator(seed), method=method) for seed in range(200)]
    values = torch.stack([x.value for x in found])
    deviations = (values.mean(dim=0) - DECAYING.diagonal()) / (values.std(dim=0) / 200**0.5)
    assert deviations.square().mean() <= 2 and deviations.abs().max() <= 5


def test_what_the_methods_are_for():
    """At equal numbers of products, where eigenvalues decay."""

    def error(method, samples):
        errors = [trace_estimate(Dense(DECAYING), samples, generator(i), method=method).value for i in range(30)]
        return (torch.stack(errors) - DECAYING.trace()).square().mean().sqrt()

    assert error("xtrace", 15) < error("hutch++", 10) < 0.5 * error("hutchinson", 30)


def test_trees_give_trees():
    def product(tree):
        y = DECAYING @ torch.cat([tree["a"].flatten(), tree["b"]])
        return {"a": y[:10].reshape(2, 5), "b": y[10:]}

    noise = normal(12, 60, seed=1)
    stacked = {"a": noise[:, :10].reshape(12, 2, 5), "b": noise[:, 10:]}
    close(trace_estimate(product, 12, noise=stacked).value, trace_estimate(Dense(DECAYING), 12, noise=noise.mT).value)
    found = diagonal_estimate(product, 12, noise=stacked)
    flat = diagonal_estimate(Dense(DECAYING), 12, noise=noise.mT)
    close(torch.cat([found.value["a"].flatten(), found.value["b"]]), flat.value)
    assert found.error["a"].shape == (2, 5)
