"""Several heads: outputs, targets and noise as trees, each head with its own mean."""

from operator import itemgetter
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from lrkfac import bernoulli, categorical, evaluator, find_layers, joint
from lrkfac.testing import gradients
from tests.compiling import traced

GENERATOR = torch.Generator().manual_seed(0)
PARAMS = {k: torch.randn(s, generator=GENERATOR, dtype=torch.float64) for k, s in {"a": (4, 3), "b": (5, 4)}.items()}
X = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
MASK = torch.rand(6, 2, generator=GENERATOR, dtype=torch.float64)
CLASS = torch.tensor([0, 2, 1, -1, 2, -1])
HEADS = (bernoulli(), categorical(ignore_index=-1, label_smoothing=0.1))
WEIGHTS = (1.0, 0.3)


class Pair(NamedTuple):
    mask: Any
    label: Any


WRAPPED = {
    "tuple": lambda m, c: (m, c),
    "dictionary": lambda m, c: {"mask": m, "class": c},
    "NamedTuple": Pair,
    "nested": lambda m, c: {"z": (m,), "a": [{"x": c}]},
}
each_tree = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
each_estimator = pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])


def forward(params, inputs):
    outputs = F.linear(F.linear(inputs, params["a"]).tanh(), params["b"])
    return outputs[:, :2], outputs[:, 2:]


def layers_and_evaluate(wrap, estimator="exact", **options):
    model = lambda p, x: wrap(*forward(p, x))  # noqa: E731
    likelihood = joint(wrap(*HEADS), wrap(*WEIGHTS))
    return evaluator(model, likelihood, find_layers(model, PARAMS, X), estimator, **options)


def alone(i, estimator="exact"):
    model = lambda p, x: forward(p, x)[i]  # noqa: E731
    f = evaluator(model, HEADS[i], find_layers(model, PARAMS, X), estimator)
    return f(PARAMS, X, (MASK, CLASS)[i])


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def B(evaluation, name):
    (g,) = evaluation.statistics.output_gradients[name]
    rows = g.flatten(0, -2)
    return evaluation.statistics.scale * rows.mT @ rows


@each_tree
def test_everything_is_the_weighted_sum_of_the_heads(wrap):
    found, heads = layers_and_evaluate(wrap)(PARAMS, X, wrap(MASK, CLASS)), [alone(0), alone(1)]
    total = lambda of: sum(weight * of(one) for weight, one in zip(WEIGHTS, heads, strict=True))  # noqa: E731
    u, v = gradients(PARAMS, 1), gradients(PARAMS, 2)
    close(found.loss, total(lambda e: e.loss))
    close(found.loss_at(u), total(lambda e: e.loss_at(u)))
    close(found.quadratic(u, v), total(lambda e: e.quadratic(u, v)))
    close(found.gram(optree.tree_map(lambda x, y: torch.stack([x, y]), u, v))[0, 1], found.quadratic(u, v))
    for name in PARAMS:
        close(found.grads[name], total(lambda e, name=name: e.grads[name]))
        close(found.product(u)[name], total(lambda e, name=name: e.product(u)[name]))
        close(B(found, name), total(lambda e, name=name: B(e, name)))
    assert optree.tree_structure(found.outputs) == optree.tree_structure(wrap(0, 0))
    assert optree.tree_all(optree.tree_map(torch.equal, found.outputs, wrap(*forward(PARAMS, X))))


@each_tree
def test_noise_is_a_tree(wrap):
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(3, *f.shape, generator=generator) for f in forward(PARAMS, X)]
    of = lambda w: layers_and_evaluate(w, "mc", samples=3)(PARAMS, X, w(MASK, CLASS), noise=w(*noise))  # noqa: E731
    close(of(wrap).statistics, of(wrap).statistics)
    close(B(of(wrap), "a"), B(of(Pair), "a"))
    assert of(wrap).statistics.output_gradients["a"][0].shape == (3, 6, 4)


def test_heads_are_drawn_independently():
    """The products across heads vanish in the mean over 5000 copies of the batch, within six standard errors."""
    many = 5000
    torch.manual_seed(0)
    f = layers_and_evaluate(Pair, "mc")
    found = f(PARAMS, X.repeat(many, 1), Pair(MASK.repeat(many, 1), CLASS.repeat(many)))
    g = found.statistics.output_gradients["b"][0][0].unflatten(0, (many, 6))
    across = (g[..., :2, None] * g[..., None, 2:]).sum(1)
    assert (across.mean(0).abs() <= 6 * across.std(0) / many**0.5).all() and across.any()


@each_estimator
def test_statistics_of_some_examples(estimator):
    f, numbers = layers_and_evaluate(Pair, estimator), torch.tensor([4, 0, 1])
    noise = Pair(torch.rand(1, 3, 2), torch.rand(1, 3, 3))
    noise = noise if estimator == "mc" else None
    found = f(PARAMS, X, Pair(MASK, CLASS), examples=numbers, noise=noise)
    close(found.statistics, f(PARAMS, X[numbers], Pair(MASK[numbers], CLASS[numbers]), noise=noise).statistics)


@each_estimator
def test_a_single_head_of_weight_zero_changes_nothing(estimator):
    model = lambda p, x: {"mask": forward(p, x)[0]}  # noqa: E731
    likelihood = joint({"mask": bernoulli()}, {"mask": 0.0})
    e = evaluator(model, likelihood, find_layers(model, PARAMS, X), estimator)(PARAMS, X, {"mask": MASK})
    assert all((g == 0).all() for g in optree.tree_leaves((e.loss, e.grads)))
    assert all(x.isfinite().all() for x in optree.tree_leaves(e.statistics))


@each_estimator
def test_a_head_of_which_nothing_counts_leaves_the_statistics_of_the_others(estimator):
    """Known by ``vmap`` over targets, where values are not looked at."""
    f = layers_and_evaluate(Pair, estimator)
    noise = Pair(torch.rand(1, 6, 2, dtype=torch.float64), torch.rand(1, 6, 3, dtype=torch.float64))
    noise = noise if estimator == "mc" else None
    run = lambda classes: itemgetter(0, 4)(f(PARAMS, X, Pair(MASK, classes), noise=noise))  # noqa: E731
    loss, statistics = vmap(run)(torch.stack([CLASS, torch.full((6,), -1)]))
    assert loss[0].isfinite() and loss[1].isnan()
    if estimator != "empirical":
        g = statistics.output_gradients["b"][0][1]
        assert g[..., :2].any() and not g[..., 2:].any() and statistics.scale.isfinite().all()


@pytest.mark.slow
@each_estimator
def test_compiled_the_same_as_eager(estimator):
    wrap = WRAPPED["dictionary"]
    f = layers_and_evaluate(wrap, estimator)
    noise = wrap(torch.rand(1, 6, 2, dtype=torch.float64), torch.rand(1, 6, 3, dtype=torch.float64))
    noise = noise if estimator == "mc" else None

    def run(p):
        e = f(p, X, wrap(MASK, CLASS), noise=noise)
        return e.loss, e.grads, e.outputs, e.statistics, e.product(p), e.quadratic(p, p)

    optree.tree_map(close, traced(run)(PARAMS), run(PARAMS))


DICTIONARY = WRAPPED["dictionary"]
REFUSED = {
    "targets without a head": ({"targets": {"mask": MASK}}, TypeError, r"targets: .*joint.*missing \['class'\]"),
    "targets of more heads": ({"targets": {**DICTIONARY(MASK, CLASS), "x": X}}, TypeError, r"unexpected \['x'\]"),
    "no tensors": ({"targets": DICTIONARY(MASK, 1)}, TypeError, "targets: expected a tree of tensors, got int"),
    "a head's targets": ({"targets": DICTIONARY(MASK, MASK)}, TypeError, "categorical: expected targets"),
    "noise": ({"noise": torch.rand(1, 6, 5), "statistics": True}, TypeError, "noise: expected a tree"),
    "noise of one sample": (
        {"noise": DICTIONARY(MASK, torch.rand(1, 6, 3)), "statistics": True}, ValueError, r"\(1, 6, 2\), got \(6, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_trees_that_do_not_fit(wrong, error, message):
    f = layers_and_evaluate(DICTIONARY, "mc")
    for statistics in (True, False):
        with pytest.raises(error, match=message):
            f(**{"params": PARAMS, "inputs": X, "targets": DICTIONARY(MASK, CLASS), "statistics": statistics, **wrong})


OUTPUTS = {
    "one head": (lambda m, c: {"mask": m}, TypeError, r"model: expected outputs as a tree .*\['class'\].*has_aux"),
    "a tensor": (lambda m, c: m, TypeError, "model: expected outputs as a tree in the structure of joint"),
    "other batch": (lambda m, c: DICTIONARY(m, c[:3]), ValueError, r"same batch axis .*\(3, 3\) and \(6, 2\)"),
    "no batch": (lambda m, c: DICTIONARY(m.sum(), c), ValueError, "outputs with a batch axis, got .*float64"),
    "integers": (lambda m, c: DICTIONARY(m.long(), c), ValueError, "floating-point outputs .*int64"),
    "no tensors": (
        lambda m, c: DICTIONARY(1.0, c),
        TypeError,
        "model: expected outputs as a tree of tensors, got float",
    ),
}


@pytest.mark.parametrize(("wrap", "error", "message"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_that_do_not_fit(wrap, error, message):
    layers = find_layers(lambda p, x: forward(p, x), PARAMS, X)
    f = evaluator(lambda p, x: wrap(*forward(p, x)), joint(DICTIONARY(*HEADS)), layers)
    with pytest.raises(error, match=message):
        f(PARAMS, X, DICTIONARY(MASK, CLASS))
