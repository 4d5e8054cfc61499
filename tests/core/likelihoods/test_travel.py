"""Likelihoods, and several of them joined, copy, pickle and save: what arrives computes the same bits."""

import pytest
import torch
from torch.func import grad

from lrkfac import bernoulli, categorical, gaussian, joint, poisson
from lrkfac.core.likelihoods.joint import Joint
from tests.travelling import each_way

HEADS = {
    "categorical with options": categorical(1, -100, [0.5, 1.0, 2.0], 0.1),
    "gaussian variances": gaussian(torch.tensor([0.5, 1.0, 2.0])),
    "bernoulli": bernoulli(),
    "poisson": poisson(),
}
LIKELIHOODS = {**HEADS, "joint": joint(HEADS, dict.fromkeys(HEADS, 0.5))}


def parts(likelihood, seed=0):
    """All that it computes."""
    if isinstance(likelihood, Joint):
        assert likelihood.weights == (0.5,) * len(HEADS)
        return [part for i, head in enumerate(likelihood.heads) for part in parts(head, i)]
    generator = torch.Generator().manual_seed(seed)
    outputs, noise = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    targets = likelihood.sample(outputs, noise).abs()  # counts are not negative
    likelihood.check(outputs, targets)
    return [
        targets, likelihood.loss(outputs, targets), grad(likelihood.loss)(outputs, targets),
        likelihood.square_root(outputs, noise), likelihood.hessian_product(outputs, noise),
        likelihood.weighted_root(outputs, targets, noise),
    ]  # fmt: skip


@each_way
@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_what_arrives_computes_the_same(likelihood, way):
    for one, other in zip(parts(likelihood), parts(way(likelihood)), strict=True):
        assert torch.equal(one, other)
