"""``inject_hyperparams``: the same as with these values, which may change in the state; and trees of values."""

import copy
import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import optree
import pytest
import torch

import lrkfac
from lrkfac import apply_updates, chain, inject_hyperparams, low_rank_kfac, scale, trace
from lrkfac.linalg import Dense
from lrkfac.schedules import exponential_decay
from tests import cases
from tests.compiling import traced
from tests.transforms.test_base import Pair, close, flat, nested, replayed, steps
from tests.transforms.test_precondition import layers_and_evaluate

MLP = cases.LINEAR[0]
LAYERS, EVALUATE = layers_and_evaluate(MLP)
OPTIONS = {"damping": 0.03, "decay": 0.8, "momentum": 0.8, "weight_decay": 0.02, "kl_clip": 5e-3}
FACTORIES = {
    "adam": (lrkfac.scale_by_adam, {"b1": 0.8, "b2": 0.99, "eps": 1e-6}),
    "trace": (trace, {"decay": 0.7, "nesterov": True}),
    "decay": (lrkfac.add_decayed_weights, {"weight_decay": 0.1}),
    "learning rate": (lrkfac.scale_by_learning_rate, {"learning_rate": 1}),
    "value": (lrkfac.clip, {"max_delta": 0.3}),
    "norm": (lrkfac.clip_by_global_norm, {"max_norm": 0.3}),
    "average": (lrkfac.ema_params, {"decay": 0.8, "power": 2.0}),
    "own": (lambda rate, decay: chain(trace(decay), scale(rate)), {"rate": -0.1, "decay": 0.5}),
}


def changed(state, **values):
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return state._replace(hyperparameters={**state.hyperparameters, **tensors})


@pytest.mark.parametrize("factory, options", FACTORIES.values(), ids=FACTORIES.keys())
def test_equals_the_transformation_with_these_values(factory, options):
    params = nested(seed=3)
    found, expected = (replayed(make(**options), steps(), params) for make in (inject_hyperparams(factory), factory))
    close(found, expected)


@pytest.mark.parametrize("make", [partial(low_rank_kfac, rank=2), lrkfac.kfac])
def test_kfac_with_schedules_and_live_changes(make):
    """In each step as the chain made with the values of this step; the factory runs when injected, never again."""
    calls = []

    def counted(layers, **options):
        calls.append(options)
        return make(layers, **options)

    rate, damping = exponential_decay(0.1, 1, 0.5), lambda step: 0.1 / (1 + step.double())
    tx = inject_hyperparams(counted)(LAYERS, learning_rate=rate, **{**OPTIONS, "damping": damping})
    params, state = MLP.params, tx.init(MLP.params)
    inner, made = state.inner, len(calls)
    assert sorted(state.hyperparameters) == sorted([*OPTIONS, "learning_rate"])
    for i in range(4):
        e = EVALUATE(params)
        live = {"momentum": 0.2, "decay": 0.6, "weight_decay": 0.1, "kl_clip": 1e9} if i >= 2 else {}
        values = {**OPTIONS, **live, "learning_rate": 0.1 * 0.5**i, "damping": 0.1 / (1 + i)}
        if i == 2:
            state = changed(state, **live, damping=100.0)
        expected, inner = make(LAYERS, **values).update(e.grads, inner, params, evaluation=e)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        close(updates, expected, rtol=1e-12)
        assert {k: pytest.approx(float(x), rel=1e-6) for k, x in state.hyperparameters.items()} == values
        params = apply_updates(params, updates)
    assert state.steps == 4 and len(calls) == made


@pytest.mark.parametrize("value", [3, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_put_into_the_state_gets_its_dtype(value, dtype):
    """At least float32, in which 0.1 is not rounded to bfloat16."""
    tx = inject_hyperparams(scale)(factor=0.1)
    state, held = tx.init(nested(dtype)), torch.promote_types(dtype, torch.float32)
    assert torch.equal(state.hyperparameters["factor"], torch.tensor(0.1, dtype=held))
    updates, state = tx.update(nested(dtype), state._replace(hyperparameters={"factor": value}))
    close(updates, optree.tree_map(lambda g: 3 * g, nested(dtype)))
    assert state.hyperparameters["factor"].dtype == held


@dataclasses.dataclass(frozen=True)
class Product:
    holder: Any

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, **extra):
        return updates * self.holder.matrix, state


def product(holder):
    return lrkfac.GradientTransformation((link := Product(holder)).init, link.update)


def closed(rate):
    return lrkfac.GradientTransformation(lambda params: (), lambda u, s, params=None, **extra: (u * rate, s))


@pytest.mark.parametrize(
    "second, square",
    [
        (lambda rate: scale(torch.stack([torch.as_tensor(rate)] * 2).sum()), 32.0),
        (lambda rate: scale(torch.neg(input=torch.as_tensor(rate))), -16.0),
        (lambda rate: scale(float(rate)), 16.0),
        (lambda rate: scale(torch.tensor(rate)), 16.0),
        (lambda rate: scale(float(f"{rate:.3f}")), 16.0),
        (lambda rate: scale(copy.deepcopy(rate)), 16.0),
        (closed, 16.0),
        (lambda rate: product(Dense(rate)), 16.0),
        (lambda rate: product(SimpleNamespace(matrix=rate)), 16.0),
        (lambda rate: lrkfac.scale_by_learning_rate(partial(lambda rate, step: rate, rate)), -16.0),
    ],
)
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_a_new_value_reaches_all_that_a_factory_makes_of_it(second, square):
    """Also a derived value, a closure, or an object that cannot be looked into: there the factory is called again."""
    tx = inject_hyperparams(lambda rate: chain(scale(rate), second(rate)))(rate=1.0)
    state = tx.init(torch.zeros(1))._replace(hyperparameters={"rate": torch.tensor(4.0)})
    assert tx.update(torch.ones(1), state)[0] == square


CHECKED = {
    **{name: FACTORIES[name] for name in ("adam", "decay", "learning rate", "value", "norm", "average")},
    "low_rank_kfac": (low_rank_kfac, {"learning_rate": 0.2, **OPTIONS}),
    "adaptive": (lrkfac.adaptive_low_rank_kfac, {"weight_decay": 0.1, "kl_clip": 1.0}),
}


@pytest.mark.parametrize("factory, values", CHECKED.values(), ids=CHECKED.keys())
def test_a_new_value_is_checked_like_the_first(factory, values):
    of_layers = [LAYERS] if factory in (low_rank_kfac, lrkfac.adaptive_low_rank_kfac) else []
    tx, e = inject_hyperparams(factory)(*of_layers, **values), EVALUATE(MLP.params)
    state = tx.init(MLP.params)
    for name in values:
        with pytest.raises(ValueError, match=r"expected a finite number in .* got -1"):
            tx.update(e.grads, changed(state, **{name: -1.0}), MLP.params, evaluation=e)


@pytest.mark.slow
def test_compiled_once_for_all_values():
    e = EVALUATE(MLP.params)
    tx = inject_hyperparams(low_rank_kfac)(LAYERS, learning_rate=exponential_decay(0.1, 1, 0.5), damping=0.1, rank=100)

    def step(grads, state, statistics):
        return tx.update(grads, state, MLP.params, evaluation=e._replace(grads=grads, statistics=statistics))

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, state = traced(step), tx.init(MLP.params)
    for damping in (0.1, 1.0, 0.01):
        state = changed(state, damping=damping)
        expected = step(e.grads, state, e.statistics)
        close(compiled(e.grads, state, e.statistics), expected, rtol=1e-8)
        state = expected[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


SCALED, GRADS = inject_hyperparams(scale)(factor=1.0), nested()
TRACED, RANKED = inject_hyperparams(trace), partial(inject_hyperparams(low_rank_kfac), LAYERS, learning_rate=0.1)


def update(**values):
    return SCALED.update(GRADS, SCALED.init(GRADS)._replace(hyperparameters=values))


BAD = [
    (lambda: inject_hyperparams(lambda decay: decay)(decay=1.0), TypeError, "factory: .* got float"),
    (lambda: TRACED(0.9), TypeError, "expected a number, .* by keyword, .*got none"),
    (lambda: TRACED(decay=lambda step: 1.5), ValueError, "decay: expected .* got 1.5"),
    (lambda: TRACED(decay=lambda layer: layer.name), TypeError, "decay: .* a schedule"),
    (lambda: TRACED(decay=lambda step: "a"), TypeError, "decay: .* a schedule"),
    (lambda: inject_hyperparams(lrkfac.accumulate)(trace(0.9), every=2), TypeError, "every: .* got Tensor"),
    (lambda: RANKED(rank=torch.tensor(3)), ValueError, "rank: expected a fixed integer.*shapes"),
    (lambda: RANKED(rank=lambda step: 3), ValueError, "rank: expected a fixed integer.*shapes"),
    (lambda: update(rate=1.0), ValueError, r"hyperparameters: expected \['factor'\], got \['rate'\]"),
    (lambda: update(factor=torch.ones(2)), ValueError, r"factor: expected a number or .* got the shape \(2,\)"),
]


@pytest.mark.parametrize("make, error, words", BAD)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


# Trees: each parameter is treated as by the transformation with its own number -----------------------------

MAKE = {
    "trace": trace,
    "nesterov": lambda decay: trace(decay, nesterov=True),
    "add_decayed_weights": lrkfac.add_decayed_weights,
    "scale_by_learning_rate": lrkfac.scale_by_learning_rate,
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
TREES = {
    "whole": ({"a": 0.1, "blocks": [0.2, (0.3, Pair(0.4, 0.5))], "one": (0.6,), "w": 0.7}, [1, 2, 3, 4, 5, 6, 7]),
    "ends earlier": ({"a": 0.1, "blocks": [0.2, 0.3], "one": 0.4, "w": torch.tensor(0.5)}, [1, 2, 3, 3, 3, 4, 5]),
}


@each
@pytest.mark.parametrize(("tree", "tenths"), TREES.values(), ids=TREES.keys())
def test_each_leaf_as_with_its_own_number(make, tree, tenths):
    params = nested(seed=3)
    found = replayed(make(tree), steps(), params)
    for i, tenth in enumerate(tenths):
        value = next(x for x in optree.tree_leaves(tree) if round(10 * float(x)) == tenth)
        for updates, expected in zip(found, replayed(make(value), steps(), params), strict=True):
            assert torch.equal([*flat(updates).values()][i], [*flat(expected).values()][i])


def test_schedules_of_some_parameters():
    grads = [{"a": torch.randn(3), "b": torch.randn(2)} for _ in range(3)]
    found = replayed(lrkfac.scale_by_learning_rate({"a": exponential_decay(0.3, 1, 0.5), "b": 0.5}), grads)
    for i, (updates, g) in enumerate(zip(found, grads, strict=True)):
        torch.testing.assert_close(updates, {"a": -0.3 * 0.5**i * g["a"], "b": -0.5 * g["b"]})


RATES = {name: 0.1 * (i + 1) for i, name in enumerate(MLP.params)}


@pytest.mark.parametrize("rates", [RATES, {**RATES, next(iter(RATES)): lambda step: 0.1}], ids=["numbers", "schedule"])
def test_the_clip_bounds_the_length_of_the_step_that_is_taken(rates):
    """``Σ rate² uᵀ∇L`` over parameters is at most the bound, and equals it where the clip binds."""
    e, bound = EVALUATE(MLP.params), 1e-5
    plain = lrkfac.precondition_by_fisher(LAYERS)
    natural, _ = plain.update(e.grads, plain.init(MLP.params), MLP.params, evaluation=e)
    for kl_clip in (bound, 1e9):
        tx = lrkfac.clip_by_kl(kl_clip, rates)
        clipped, _ = tx.update(natural, tx.init(MLP.params), MLP.params, evaluation=e)
        length = sum(RATES[n] ** 2 * (natural[n] * e.grads[n]).sum() for n in RATES)
        assert (length > bound) and length < 1e9
        factor = min(1.0, float((kl_clip / length).sqrt()))
        torch.testing.assert_close(clipped, {n: factor * u for n, u in natural.items()}, rtol=1e-12, atol=0)


@each
def test_trees_that_do_not_fit(make):
    with pytest.raises(ValueError, match=r"(decay|learning_rate): expected a tree like the parameters"):
        make({"a": 0.1, "c": 0.2}).init({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"(decay|learning_rate) at 'b\.0': expected a finite number"):
        make({"a": 0.1, "b": [-0.1]})
