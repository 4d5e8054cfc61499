"""Cotangents are made a few at a time: equal to all at once, without the memory of that."""

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac.core.evaluation import cotangents
from lrkfac.core.evaluation.cotangents import exact_cotangents, sampled_cotangents
from tests import reference
from tests.dispatch import LargestTensor, PeakMemory
from tests.tensors import close, normal

LIKELIHOODS = {"categorical": lrkfac.categorical(), "gaussian": lrkfac.gaussian(), "bernoulli": lrkfac.bernoulli()}
each_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))


def same(cotangents):
    return {"all": cotangents}


@each_likelihood
@given(shape=sizes, seed=st.integers(0, 2**16), at_once=st.integers(1, 30))
def test_exact_columns_are_those_of_the_root(name, shape, seed, at_once):
    """``Σ c cᵀ`` over the columns ``c`` of one example is its Hessian, whatever number is made at once."""
    outputs, heads = normal(*shape, seed=seed), lrkfac.joint(LIKELIHOODS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotangents, "COLUMNS_AT_ONCE", at_once)
        columns = exact_cotangents(heads, [outputs], [outputs[..., 0]], [1.0], same)["all"][0].flatten(2)
    assert columns.shape == (shape[1] * shape[2], shape[0], shape[1] * shape[2])
    blocks = reference.output_hessian(name, outputs)
    expected = torch.stack([torch.block_diag(*part) for part in blocks.split(len(blocks) // shape[0])])
    close(torch.einsum("kni,knj->nij", columns, columns), expected)


@each_likelihood
@given(shape=sizes, seed=st.integers(0, 2**16), samples=st.integers(1, 3), at_once=st.integers(1, 60))
def test_targets_drawn_in_parts_are_those_drawn_at_once(name, shape, seed, samples, at_once):
    outputs, noise = normal(*shape, seed=seed), normal(samples, *shape, seed=seed + 1).sigmoid()
    likelihood = LIKELIHOODS[name]

    def total(outputs, u):
        return likelihood.negative_log_likelihood(outputs, likelihood.sample(outputs, u).detach()).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotangents, "OUTPUTS_AT_ONCE", at_once)
        arguments = (lrkfac.joint(likelihood), [outputs], [outputs[..., 0]], [1.0], same, samples)
        sampled, drawn = (sampled_cotangents(*arguments, u)["all"][0] for u in (noise, None))
    close(sampled, torch.stack([torch.func.grad(total)(outputs, u) for u in noise]))
    assert drawn.shape == sampled.shape


def evaluated(model, params, inputs, targets, estimator):
    """``statistics -> Evaluation``, after the first batch."""
    layers = lrkfac.find_layers(model, params, inputs)
    f = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)
    f(params, inputs, targets, statistics=False)
    return lambda statistics: f(params, inputs, targets, statistics=statistics)


def test_exact_statistics_take_no_more_than_themselves_and_a_few_columns():
    """Of 400 classes behind a narrow layer: all columns are 400 · 20 · 400 numbers, the statistics 400 · 20 · 8."""
    classes, examples, narrow = 400, 20, 8
    fixed = torch.randn(classes, narrow)
    params, inputs = {"w": torch.randn(narrow, 5)}, torch.randn(examples, 5)
    targets = torch.randint(classes, (examples,))
    run = evaluated(lambda p, x: torch.tanh(F.linear(x, p["w"])) @ fixed.mT, params, inputs, targets, "exact")
    with LargestTensor() as largest:
        run(True)
    few = cotangents.COLUMNS_AT_ONCE * examples * classes
    assert largest.numel <= max(few, classes * examples * narrow)
    with PeakMemory() as memory:
        evaluation = run(True)
    size = sum(x.untyped_storage().nbytes() for x in optree.tree_leaves(evaluation.statistics))
    assert memory.peak <= 1.1 * size + 6 * 4 * few


def test_monte_carlo_statistics_of_many_tokens_take_the_memory_of_a_gradient(monkeypatch):
    """Of 20 · 50 tokens and 200 words: where targets are drawn, the memory of the loss is free again."""
    monkeypatch.setattr(cotangents, "OUTPUTS_AT_ONCE", 200 * 50)
    params = {"e": torch.randn(200, 8), "h": torch.randn(200, 8)}
    inputs, targets = torch.randint(200, (20, 50)), torch.randint(200, (20, 50))
    run = evaluated(lambda p, x: F.linear(F.embedding(x, p["e"]), p["h"]), params, inputs, targets, "mc")
    with PeakMemory() as gradient:
        run(False)
    with PeakMemory() as statistics:
        run(True)
    assert 0 < gradient.peak and statistics.peak <= 1.1 * gradient.peak
