"""Several heads: trees of outputs, targets and noise, selections, weights of zero; else ``test_protocol.py``."""

from operator import itemgetter
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from lrkfac import bernoulli, categorical, evaluator, find_layers, joint
from tests.compiling import traced
from tests.tensors import close, normal

PARAMS, X = {"a": normal(4, 3), "b": normal(5, 4, seed=1)}, normal(6, 3, seed=2)
MASK, CLASS = normal(6, 2, seed=3).sigmoid(), torch.tensor([0, 2, 1, -1, 2, -1])
NOISE = normal(1, 6, 2, seed=4).sigmoid(), normal(1, 6, 3, seed=5).sigmoid()
HEADS = (bernoulli(), categorical(ignore_index=-1, label_smoothing=0.1))
WEIGHTS = (1.0, 0.3)


class Pair(NamedTuple):
    mask: Any
    label: Any


def dictionary(mask, label):
    return {"mask": mask, "class": label}


WRAPPED = {
    "tuple": lambda m, c: (m, c),
    "dictionary": dictionary,
    "NamedTuple": Pair,
    "nested": lambda m, c: {"z": (m,), "a": [{"x": c}]},
}
each_estimator = pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])


def forward(params, inputs):
    outputs = F.linear(F.linear(inputs, params["a"]).tanh(), params["b"])
    return outputs[:, :2], outputs[:, 2:]


def evaluate_with(wrap, estimator="exact", likelihood=None):
    model = lambda p, x: wrap(*forward(p, x))  # noqa: E731
    likelihood = likelihood or joint(wrap(*HEADS), wrap(*WEIGHTS))
    return evaluator(model, likelihood, find_layers(model, PARAMS, X), estimator)


def noise_for(wrap, estimator, size=6):
    return wrap(*(u[:, :size] for u in NOISE)) if estimator == "mc" else None


def B(evaluation, name):
    rows = evaluation.statistics.output_gradients[name][0].flatten(0, -2)
    return evaluation.statistics.scale * rows.mT @ rows


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("estimator", ["mc", "exact"])
def test_any_tree_of_heads(wrap, estimator):
    f, g = evaluate_with(wrap, estimator), evaluate_with(Pair, estimator)
    found = f(PARAMS, X, wrap(MASK, CLASS), noise=noise_for(wrap, estimator))
    expected = g(PARAMS, X, Pair(MASK, CLASS), noise=noise_for(Pair, estimator))
    everything = lambda e: (e.loss, e.loss_at(PARAMS), e.grads, e.product(PARAMS), B(e, "a"), B(e, "b"))  # noqa: E731
    close(everything(found), everything(expected))
    assert optree.tree_structure(found.outputs) == optree.tree_structure(wrap(0, 0))
    assert optree.tree_all(optree.tree_map(torch.equal, found.outputs, wrap(*forward(PARAMS, X))))


@each_estimator
def test_statistics_of_some_examples(estimator):
    f, numbers, noise = evaluate_with(Pair, estimator), torch.tensor([4, 0, 1]), noise_for(Pair, estimator, 3)
    found = f(PARAMS, X, Pair(MASK, CLASS), examples=numbers, noise=noise)
    of_some = f(PARAMS, X[numbers], Pair(MASK[numbers], CLASS[numbers]), noise=noise).statistics
    close(found.statistics, of_some._replace(residuals=()))  # the gradient is that of all examples


@each_estimator
def test_heads_of_which_nothing_counts(estimator):
    """A single one of weight zero; one without targets beside another, by ``vmap``, where values are not looked at."""
    f = evaluate_with(lambda m, c: {"mask": m}, estimator, joint({"mask": bernoulli()}, {"mask": 0.0}))
    e = f(PARAMS, X, {"mask": MASK})
    assert all((g == 0).all() for g in optree.tree_leaves((e.loss, e.grads)))
    assert all(x.isfinite().all() for x in optree.tree_leaves(e.statistics))
    f, noise = evaluate_with(Pair, estimator), noise_for(Pair, estimator)
    run = lambda classes: itemgetter(0, 4)(f(PARAMS, X, Pair(MASK, classes), noise=noise))  # noqa: E731
    loss, statistics = vmap(run)(torch.stack([CLASS, torch.full((6,), -1)]))
    assert loss[0].isfinite() and loss[1].isnan()
    if estimator != "empirical":
        g = statistics.output_gradients["b"][0][1]
        assert g[..., :2].any() and not g[..., 2:].any() and statistics.scale.isfinite().all()


@pytest.mark.slow
@each_estimator
def test_compiled_the_same_as_eager(estimator):
    """Where values are not looked at: without valid targets the loss is not finite."""
    f, noise = evaluate_with(dictionary, estimator), noise_for(dictionary, estimator)

    def run(p, classes):
        e = f(p, X, dictionary(MASK, classes), noise=noise)
        return e.loss, e.grads, e.outputs, e.statistics, e.product(p), e.quadratic(p, p)

    compiled = traced(run)
    close(compiled(PARAMS, CLASS), run(PARAMS, CLASS))
    loss, *_, statistics, _, _ = compiled(PARAMS, torch.full((6,), -1))
    assert loss.isnan() and statistics.scale.isfinite()


ARGUMENTS = [
    ({"targets": {"mask": MASK}}, TypeError, r"targets: .*joint.*missing \['class'\]"),
    ({"targets": MASK}, TypeError, r"targets: .*joint.*got one tensor in place of the entries \['class', 'mask'\]"),
    ({"targets": {**dictionary(MASK, CLASS), "x": X}}, TypeError, r"unexpected \['x'\]"),
    ({"targets": dictionary(MASK, 1)}, TypeError, "targets: expected a tree of tensors, got int"),
    ({"targets": dictionary(MASK, MASK)}, TypeError, "categorical: expected targets"),
    ({"noise": torch.rand(1, 6, 5), "statistics": True}, TypeError, "noise: expected a tree"),
    ({"noise": dictionary(MASK, NOISE[1]), "statistics": True}, ValueError, r"\(1, 6, 2\), got \(6, 2\)"),
]
OUTPUTS = [
    (lambda m, c: {"mask": m}, TypeError, r"model: expected outputs as a tree .*\['class'\].*has_aux"),
    (lambda m, c: m, TypeError, "model: expected outputs as a tree in the structure of joint"),
    (lambda m, c: dictionary(m, c[:3]), ValueError, r"categorical: expected .*targets.*\(3,\)"),
    (lambda m, c: dictionary(1.0, c), TypeError, "model: expected outputs as a tree of tensors, got float"),
]
CALLS = [(dictionary, *call) for call in ARGUMENTS] + [(wrap, {}, *refusal) for wrap, *refusal in OUTPUTS]


@pytest.mark.parametrize(("wrap", "wrong", "error", "message"), CALLS, ids=[message for *_, message in CALLS])
def test_trees_that_do_not_fit(wrap, wrong, error, message):
    layers = find_layers(forward, PARAMS, X)
    f = evaluator(lambda p, x: wrap(*forward(p, x)), joint(dictionary(*HEADS)), layers)
    arguments = {"params": PARAMS, "inputs": X, "targets": dictionary(MASK, CLASS)}
    for statistics in (True, False):
        with pytest.raises(error, match=message):
            f(**{**arguments, "statistics": statistics, **wrong})
