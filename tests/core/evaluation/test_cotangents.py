"""Cotangents are made a few at a time: equal to all at once, without the memory of that."""

from dataclasses import replace

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac.core.base.processes import Processes
from lrkfac.core.evaluation import cotangents
from lrkfac.core.evaluation.cotangents import exact_cotangents, example_numbers, random_signs, sampled_cotangents
from lrkfac.core.evaluation.parts import Parts
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

    def drawn(noise):
        torch.manual_seed(seed)
        heads = lrkfac.joint(likelihood)
        return sampled_cotangents(heads, [outputs], [outputs[..., 0]], [1.0], same, samples, noise)["all"][0]

    whole = drawn(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotangents, "OUTPUTS_AT_ONCE", at_once)
        close(drawn(noise), torch.stack([torch.func.grad(total)(outputs, u) for u in noise]))
        close(drawn(None), whole)  # of vectors of other lengths, sigmoid rounds otherwise


def draws_of(heads, outputs, processes=None):
    """Cotangents of three samples, ``[3, N, *]`` of each head, signs ``[columns, N]``, and the generator's next."""
    torch.manual_seed(1)
    targets = [f.argmax(-1) if f.shape[-1] == 4 else f for f in outputs]
    cotangents = sampled_cotangents(heads, outputs, targets, [1.0] * len(outputs), same, 3, None, processes)["all"]
    signs = random_signs(heads, outputs, None, processes)
    return [*cotangents, signs.mT[None]], torch.rand(5)


HEADS = {
    "one": (lrkfac.categorical(), [normal(14, 5, 4)]),
    "two": ((lrkfac.gaussian(), lrkfac.categorical()), [normal(14, 2, seed=1), normal(14, 4, seed=2)]),
}


@pytest.mark.parametrize("heads, outputs", HEADS.values(), ids=HEADS)
def test_processes_draw_parts_of_one_joint_draw(heads, outputs):
    """Each its own, of any size, in the order in which ``DistributedSampler`` deals examples."""
    heads, world = lrkfac.joint(heads), 3
    whole, after = draws_of(heads, outputs)
    for rank in range(world):
        part, after_part = draws_of(heads, [f[rank::world] for f in outputs], Processes("", rank, world))
        close(part, [x[:, rank::world] for x in whole])
        assert torch.equal(after_part, after), "the generators of all processes go on alike"


@pytest.mark.parametrize("estimator", ["mc", "exact"])
def test_an_evaluator_hands_on_the_place_of_its_process(estimator):
    """Statistics of a part are rows of those of the whole."""
    model, params, x, y = lambda p, x: x @ p["w"].T, {"w": normal(4, 3)}, normal(9, 3, seed=1), torch.arange(9) % 4
    layers = replace(lrkfac.find_layers(model, params, x), independent=False)  # "exact" then draws signs
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)
    torch.manual_seed(0)
    whole = evaluate(params, x, y).statistics.output_gradients["w"][0]
    torch.manual_seed(0)
    part = replace(evaluate, parts=Parts(Processes("", 1, 3), 1))._evaluate(params, x[1::3], y[1::3], True, *[None] * 3)
    close(part.statistics.output_gradients["w"][0], whole[:, 1::3])


def test_examples_of_different_processes_never_share_a_number():
    sizes = (5, 9, 0, 2)
    numbers = [example_numbers(torch.zeros(n, 3), Processes("", rank, len(sizes))) for rank, n in enumerate(sizes)]
    assert len(torch.cat(numbers).unique()) == sum(sizes)
    assert torch.equal(example_numbers(torch.zeros(3), None), torch.arange(3))


def test_samples_heads_examples_and_calls_are_drawn_independently():
    """Errors of a Gaussian, and signs, of the same outputs everywhere."""
    outputs, heads = torch.zeros(60, 7, dtype=torch.float64), lrkfac.joint((lrkfac.gaussian(), lrkfac.gaussian()))
    drawn = [sampled_cotangents(heads, [outputs] * 2, [outputs] * 2, [1.0] * 2, same, 20, None) for _ in range(5)]
    x = torch.stack([torch.stack(list(d["all"])) for d in drawn])  # [calls, heads, samples, N, entries]
    signs = torch.stack([random_signs(heads, [outputs] * 2, None) for _ in range(40)])
    for z, axes in ((x, range(5)), (signs.double(), range(3))):
        assert z.mean().abs() < 4 / z.numel() ** 0.5 and (z.square().mean() - 1).abs() < 6 / z.numel() ** 0.5
        for axis in axes:
            products = (z * z.roll(1, axis)).mean()
            assert products.abs() < 4 / (z.numel() / 2) ** 0.5, axis


def test_an_empty_part_draws_nothing():
    empty = [torch.zeros(0, 4)]
    (cotangent, signs), _ = draws_of(lrkfac.joint(lrkfac.categorical()), empty, Processes("", 2, 3))
    assert cotangent.shape == (3, 0, 4) and signs.shape == (1, 0, 4)


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
