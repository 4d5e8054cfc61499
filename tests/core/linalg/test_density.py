"""Spectral densities: quadrature is exact for moments, and the trace of functions follows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkfac.curvature import spectral_density
from lrkfac.linalg import Dense
from lrkfac.testing import seeds
from tests.core.linalg.test_eigen import symmetric
from tests.tensors import close, normal


@settings(max_examples=15)
@given(seeds, st.integers(1, 12), st.integers(1, 6))
def test_moments_of_each_vector_are_exact_to_the_degree_of_gauss(seed, d, m):
    m = min(d, m)
    matrix, noise = symmetric(normal(d, seed=seed), seed)[0], normal(d, 3, seed=seed + 1)
    found = spectral_density(Dense(matrix), 3, m, noise=noise)
    close(found.weights.sum(dim=1), torch.ones(3).double())
    image = noise
    for power in range(2 * m):
        expected = (noise * image).sum(dim=0) / noise.square().sum(dim=0)
        close((found.weights * found.nodes**power).sum(dim=1), expected, rtol=1e-8, atol=1e-8)
        close(found.moment(power), expected.mean(), rtol=1e-8, atol=1e-8)
        image = matrix @ image


def test_with_all_directions_traces_of_functions_are_exact():
    values = torch.tensor([0.5, 1.0, 1.0, 2.0, 7.0]).double()
    matrix = symmetric(values)[0]
    found = spectral_density(Dense(matrix), 5, 5, noise=torch.eye(5).double())
    close(found.trace_of(torch.log), torch.logdet(matrix), atol=1e-9)
    points = torch.linspace(-2, 12, 2001).double()
    bumps = torch.exp(-((points[:, None] - values) ** 2) / 0.5) / (0.25 * 2 * torch.pi) ** 0.5
    close(found.density(points, 0.5), bumps.mean(dim=1), atol=1e-9)
    assert abs(torch.trapezoid(found.density(points, 0.5), points) - 1) < 1e-3


def test_an_exhausted_space_has_nodes_of_no_weight_and_logarithms_stay_finite():
    found = spectral_density(Dense(2 * torch.eye(4)), 2, 4, generator=torch.Generator().manual_seed(0))
    close(found.trace_of(torch.log), 4 * torch.tensor(2.0).log(), rtol=1e-5, atol=0)


def test_the_vectors_come_from_the_generator_alone():
    matrix = symmetric(torch.arange(30.0).double())[0]

    def density(seed):
        return spectral_density(
            lambda x: matrix @ x, 2, 5, torch.Generator().manual_seed(seed), like=torch.zeros(30).double()
        )

    before = torch.get_rng_state()
    assert torch.equal(density(0).nodes, density(0).nodes) and not torch.equal(density(0).nodes, density(1).nodes)
    assert torch.equal(torch.get_rng_state(), before)
    for source in ({}, {"generator": torch.Generator(), "noise": torch.eye(30)[:, :2]}):
        with pytest.raises(ValueError, match="generator, noise: expected exactly one of them"):
            spectral_density(Dense(matrix), 2, 5, **source)
