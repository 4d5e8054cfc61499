"""Micro-batches are one batch: by ``merge_evaluations`` with statistics, by ``accumulate`` for gradients alone."""

from functools import cache, partial

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import accumulate, chain, merge_evaluations, precondition_by_fisher, scale_by_adam
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.structures import kronecker
from lrkfac.testing import seeds
from lrkfac.testing.architectures import architectures
from tests import reference_kinds
from tests.compiling import traced
from tests.tensors import normal
from tests.test_every_combination import BLOCKS, ESTIMATORS, FACTORS
from tests.transforms.test_base import close, nested, replayed, steps
from tests.transforms.test_precondition import DENSE

OPERATIONS = reference_kinds.operations()
STRUCTURES = {
    **{name: kronecker(factor, factor) for name, factor in FACTORS.items()},
    "low rank 1": kronecker(lrkfac.structures.low_rank(1), lrkfac.structures.low_rank_plus_diagonal(1)),
    "reduce": kronecker(lrkfac.structures.dense(), lrkfac.structures.dense(), treatment="reduce"),
    **BLOCKS,
}
SOME = {name: STRUCTURES[name] for name in ("dense", "low rank 1", "reduce", "full")}
LIKELIHOOD = lrkfac.categorical(ignore_index=-1, class_weights=torch.tensor([0.5, 1.0, 2.0]))
TARGETS = torch.tensor([2, -1, 1, 0])
INNER = chain(scale_by_adam(), lrkfac.trace(0.9), lrkfac.add_decayed_weights(0.1))


def split(tree, sizes, axis=0):
    parts = optree.tree_map(lambda x: x.split(sizes, axis), tree)
    return [optree.tree_map(lambda _, p, i=i: p[i], tree, parts) for i in range(len(sizes))]


def both(evaluate, params, inputs, targets, sizes, noise=None):
    """The evaluation of one batch, and that merged of its micro-batches."""
    of_each = zip(split(inputs, sizes), split(targets, sizes), strict=True)
    noises = [None] * len(sizes) if noise is None else split(noise, sizes, axis=1)
    merged = [evaluate(params, x, y, noise=u) for (x, y), u in zip(of_each, noises, strict=True)]
    return evaluate(params, inputs, targets, noise=noise), merge_evaluations(merged)


@cache
def of_operation(name, estimator):
    """A batch of terms of different weights, one of them without any, and its micro-batches."""
    operation = OPERATIONS[name]
    params, model = reference_kinds.with_head(operation), partial(reference_kinds.network, operation)
    layers = lrkfac.find_layers(model, params, operation.inputs, bias="separate" if name == "bias" else "joint")
    noise = torch.rand(2, 4, reference_kinds.CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    evaluate = lrkfac.evaluator(model, LIKELIHOOD, layers, estimator, samples=2 if estimator == "mc" else 1)
    noise = noise if estimator == "mc" else None
    return layers, params, both(evaluate, params, operation.inputs, TARGETS, [1, 3], noise)


def same_step(tx, params, whole, merged, rtol=1e-8):
    found, expected = (tx.update(e.grads, tx.init(params), params, evaluation=e)[0] for e in (merged, whole))
    close(found, expected, rtol)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_micro_batches_are_one_batch_for_every_layer_estimator_and_structure(name, estimator):
    """Structures see the statistics alone: all of them those of one estimator, some those of the others."""
    layers, params, (whole, merged) = of_operation(name, estimator)
    close(*[(e.loss, e.grads, e.outputs, e.weight) for e in (merged, whole)])
    for structure in (STRUCTURES if estimator == "exact" else SOME).values():
        if estimator != "forward_only" or isinstance(structure, KroneckerStructure):
            same_step(precondition_by_fisher(layers, structure, damping=0.03), params, whole, merged)


@settings(max_examples=10)
@given(architectures(dtype=torch.float64), st.sampled_from(ESTIMATORS), st.data())
def test_micro_batches_of_any_model(architecture, estimator, data):
    """Statistics give the same step of K-FAC, Fisher products and losses at other parameters the same numbers."""
    model, params, inputs, targets, likelihood, _ = architecture
    layers = lrkfac.find_layers(model, params, inputs)
    n = targets.shape[0]
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
    sizes = [high - low for low, high in zip([0, *cuts], [*cuts, n], strict=True)]
    if any(not layer.by_example for layer in layers):
        sizes = [1] * n
    noise = torch.rand(1, *model(params, inputs).shape, dtype=torch.float64)
    evaluate = lrkfac.evaluator(model, likelihood, layers, estimator)
    whole, merged = both(evaluate, params, inputs, targets, sizes, noise if estimator == "mc" else None)
    close(merged.grads, whole.grads, rtol=1e-10)
    same_step(lrkfac.kfac(layers, 0.1, damping=0.1) if len(layers) else chain(), params, whole, merged)
    u, v = (optree.tree_map(function, params) for function in (torch.cos, torch.sin))
    pair = optree.tree_map(lambda a, b: torch.stack([a, b]), u, v)
    of = lambda e: (e.product(u), e.quadratic(u, v), e.gram(pair), e.loss_at(u), e.loss)  # noqa: E731
    close(of(merged), of(whole), rtol=1e-9)


def test_one_micro_batch_and_one_without_terms():
    _, _, (whole, _) = of_operation("linear", "empirical")
    close(merge_evaluations([whole])[:5], whole[:5], rtol=1e-14)
    e = whole._replace(statistics=None)
    merged = merge_evaluations([e, e._replace(aux={"x": 1})])
    assert merged.statistics is None and merged.aux == (None, {"x": 1}) and merge_evaluations([e, e]).aux is None
    loss, grads, gradients = optree.tree_map(
        lambda x: x * float("nan"), (whole.loss, whole.grads, whole.statistics.output_gradients)
    )
    scale = torch.full_like(loss, 1 / torch.finfo(torch.float64).tiny)
    statistics = whole.statistics._replace(output_gradients=gradients, scale=scale)
    empty = whole._replace(loss=loss, grads=grads, statistics=statistics, weight=torch.zeros_like(loss))
    merged, n = merge_evaluations([empty, whole]), len(whole.outputs)
    of = lambda e: (e.loss, e.grads, e.weight, e.statistics.scale)  # noqa: E731
    close(of(merged), of(whole), rtol=1e-14)
    for name, uses in whole.statistics.output_gradients.items():
        for found, g in zip(merged.statistics.output_gradients[name], uses, strict=True):
            assert torch.equal(found[:, n:], g) and not found[:, :n].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_heads(estimator):
    """Of several likelihoods, each with one term for each example or position."""
    heads = lrkfac.joint({"a": lrkfac.gaussian(), "b": lrkfac.categorical()}, {"a": 0.3, "b": 2.0})
    params = {"a": normal(2, 3), "b": normal(3, 3)}
    model = lambda p, x: {"a": x @ p["a"].mT, "b": torch.tanh(x @ p["b"].mT)}  # noqa: E731
    inputs, targets = normal(5, 3), {"a": normal(5, 2), "b": torch.tensor([0, 1, 2, 1, 0])}
    layers = lrkfac.find_layers(model, params, inputs)
    noise = {"a": torch.rand(1, 5, 2).double(), "b": torch.rand(1, 5, 3).double()} if estimator == "mc" else None
    whole, merged = both(lrkfac.evaluator(model, heads, layers, estimator), params, inputs, targets, [1, 4], noise)
    same_step(precondition_by_fisher(layers, DENSE), params, whole, merged, rtol=1e-9)
    close((merged.grads, merged.outputs), (whole.grads, whole.outputs))


@pytest.mark.slow
def test_compiled_equals_eager():
    operation = OPERATIONS["linear"]
    layers, params, _ = of_operation("linear", "exact")
    tx = lrkfac.kfac(layers, 0.1)
    evaluate = lrkfac.evaluator(partial(reference_kinds.network, operation), LIKELIHOOD, layers, "exact")
    parts = list(zip(split(operation.inputs, [1, 3]), split(TARGETS, [1, 3]), strict=True))

    def step(params, state):
        e = merge_evaluations([evaluate(params, x, y) for x, y in parts])
        return tx.update(e.grads, state, params, evaluation=e)

    given = params, tx.init(params)
    close(traced(step)(*given), step(*given), rtol=1e-8)


@given(st.integers(1, 4), st.integers(0, 9), seeds)
def test_accumulate_equals_the_loop(every, number, seed):
    params, grads = nested(seed=seed), steps(number)
    tx, state = accumulate(INNER, every), INNER.init(params)
    gathered = []
    for found, g in zip(replayed(tx, grads, params) if grads else [], grads, strict=True):
        gathered.append(g)
        if len(gathered) < every:
            assert not any(u.any() for u in optree.tree_leaves(found))
        else:
            mean = optree.tree_map(lambda *x: sum(x) / len(x), *gathered)
            expected, state = INNER.update(mean, state, params)
            close(found, expected, rtol=1e-9)
            gathered = []


def test_accumulate_counts_the_terms():
    """Micro-batches of 1 and of the other valid targets, and one without any, are one batch."""
    operation = OPERATIONS["linear"]
    params, model = reference_kinds.with_head(operation), partial(reference_kinds.network, operation)
    evaluate = lrkfac.evaluator(model, LIKELIHOOD, lrkfac.find_layers(model, params, operation.inputs))
    whole = evaluate(params, operation.inputs, TARGETS, statistics=False)
    tx = accumulate(chain(), 3)
    state = tx.init(params)
    for x, y in zip(split(operation.inputs, [1, 3]), split(TARGETS, [1, 3]), strict=True):
        e = evaluate(params, x, y, statistics=False)
        _, state = tx.update(e.grads, state, params, evaluation=e)
    empty = e._replace(weight=torch.zeros_like(e.weight))
    nothing = optree.tree_map(lambda g: g * float("nan"), e.grads)
    updates, state = tx.update(nothing, state, params, evaluation=empty)
    close(updates, whole.grads)
    assert state.steps == state.weight == 0


DIFFERENT = [
    ({"grads": {}}, r"evaluations\[1\].grads: the tree differs"),
    ({"statistics": None}, "evaluations: expected statistics of all or of none"),
    ({"statistics": lrkfac.Statistics({}, {}, torch.ones(()))}, r"evaluations\[1\]: expected .* of the same layers"),
    ({"outputs": torch.ones(4, 7)}, "evaluations: outputs have the shapes .*padding"),
]


@pytest.mark.parametrize("change, words", DIFFERENT)
def test_evaluations_that_differ_are_refused(change, words):
    e, _ = of_operation("linear", "exact")[2]
    with pytest.raises(ValueError, match=words):
        merge_evaluations([e, e._replace(**change)])
    with pytest.raises(ValueError, match=r"accumulate: expected an evaluation without statistics.*merge_evaluations"):
        accumulate(INNER, 2).update(nested(), accumulate(INNER, 2).init(nested()), evaluation=e)
