"""The families: samples, extremes, shapes, copies. Their parts fit together: ``tests/test_check_likelihood.py``."""

from functools import partial

import pytest
import torch
from torch.func import grad, vmap

from lrkfac import bernoulli, categorical, gaussian, joint, poisson
from tests.tensors import close, normal
from tests.travelling import each_way

LIKELIHOODS = {"categorical": categorical(), "gaussian": gaussian(0.25), "bernoulli": bernoulli()}


def test_samples_are_quantiles():
    """Where a target is one number, noise ``u`` gives the ``u``-quantile, of labels from the upper end."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5)[:, None] / 1000
    outputs = torch.full_like(u, -0.7)
    normal = torch.distributions.Normal(outputs, 0.5)
    close(gaussian(0.25).sample(outputs, u), normal.icdf(u))
    labels = bernoulli().sample(outputs, u)
    assert labels.unique().tolist() == [0, 1] and abs(labels.mean() - outputs[0].sigmoid()) <= 1 / 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_extremes_stay_finite(name, dtype):
    """Noise at both ends of [0, 1), and logits where probabilities are 0 or 1 to rounding."""
    likelihood = LIKELIHOODS[name]
    wide = torch.promote_types(dtype, torch.float32)
    outputs = torch.tensor([[0.0, 0.0], [200.0, -200.0], [-1e4, 1e4]], dtype=dtype)
    for u in (0.0, 0.5, 1 - torch.finfo(wide).eps):
        targets = likelihood.sample(outputs, torch.full(outputs.shape, u, dtype=wide))
        likelihood.check(outputs, targets)
        assert targets.isfinite().all()
        nll = likelihood.negative_log_likelihood(outputs, targets)
        assert nll.isfinite().all() and nll.dtype == wide
    for method in (likelihood.hessian_product, likelihood.square_root):
        result = method(outputs, torch.ones_like(outputs))
        assert result.isfinite().all() and result.dtype == dtype


OUTPUTS = torch.zeros(4, 3)
REFUSED = {
    "one term per position": (categorical(), OUTPUTS[None], torch.zeros(1).long(), r"shape \(1, 4\), got \(1,\)"),
    "no classes": (categorical(), OUTPUTS[0], torch.zeros(3).long(), r"outputs \[N, C\].*\(3,\)"),
    "no such axis": (categorical(2), OUTPUTS, torch.zeros(4).long(), "axis 2, of more axes"),
    "the batch": (categorical(-2), OUTPUTS, torch.zeros(3).long(), "axis -2, of more axes"),
    "classes in front": (categorical(1), OUTPUTS[None], torch.zeros(1, 4).long(), r"shape \(1, 3\), got \(1, 4\)"),
    "too few weights": (
        categorical(class_weights=[1, 2]), OUTPUTS, torch.zeros(4).long(),
        r"class_weights: expected one for each of 3 classes \(axis -1 of .*\(4, 3\)\), got 2"),
}  # fmt: skip


@pytest.mark.parametrize(("likelihood", "outputs", "targets", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_targets_that_do_not_fit(likelihood, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check(outputs, targets)


HEADS = (categorical(1, -100, [0.5, 1.0, 2.0], 0.1), gaussian(torch.tensor([0.5, 1.0, 2.0])), bernoulli(), poisson())


def computed(likelihood, outputs, noise):
    targets = likelihood.sample(outputs, noise).abs()  # counts are not negative
    loss, gradient = likelihood.loss(outputs, targets), grad(likelihood.loss)(outputs, targets)
    root, product = (method(outputs, noise) for method in (likelihood.square_root, likelihood.hessian_product))
    return targets, loss, gradient, root, product, likelihood.weighted_root(outputs, targets, noise)


@pytest.mark.parametrize("likelihood", HEADS, ids=lambda x: x.name)
def test_everything_works_under_vmap(likelihood):
    outputs, noise = normal(2, 4, 3), normal(2, 4, 3, seed=1).sigmoid()
    found = vmap(partial(computed, likelihood))(outputs, noise)
    for i in range(2):
        close(tuple(x[i] for x in found), computed(likelihood, outputs[i], noise[i]))


@each_way
def test_what_arrives_computes_the_same_bits(way):
    """Likelihoods, and several of them joined, copied, pickled and saved."""
    arrived = way(joint(HEADS, (0.5,) * 4))
    assert arrived.weights == (0.5,) * 4
    arguments = normal(4, 3), normal(4, 3, seed=1).sigmoid()
    for heads in (arrived.heads, map(way, HEADS)):
        close([computed(head, *arguments) for head in heads], [computed(head, *arguments) for head in HEADS], 0, 0)
