"""``inject_hyperparams``: the same as a transformation made with these values, which may change in the state."""

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac import apply_updates, chain, inject_hyperparams, low_rank_kfac, scale, trace
from lrkfac.schedules import exponential_decay
from tests import cases
from tests.compiling import traced
from tests.transforms.test_base import close, nested, replayed, steps
from tests.transforms.test_precondition import layers_and_evaluate

MLP = cases.LINEAR[0]
OPTIONS = {"damping": 0.03, "decay": 0.8, "momentum": 0.8, "weight_decay": 0.02, "kl_clip": 5e-3}
FACTORIES = {
    "adam": (lrkfac.scale_by_adam, {"b1": 0.8, "b2": 0.99, "eps": 1e-6}),
    "trace": (trace, {"decay": 0.7, "nesterov": True}),
    "decay": (lrkfac.add_decayed_weights, {"weight_decay": 0.1}),
    "learning rate": (lrkfac.scale_by_learning_rate, {"learning_rate": 1}),
    "value": (lrkfac.clip, {"max_delta": 0.3}),
    "norm": (lrkfac.clip_by_global_norm, {"max_norm": 0.3}),
    "average": (lrkfac.ema_params, {"decay": 0.8}),
    "own": (lambda rate, decay: chain(trace(decay), scale(rate)), {"rate": -0.1, "decay": 0.5}),
}
each_factory = pytest.mark.parametrize("factory, options", FACTORIES.values(), ids=FACTORIES.keys())


def changed(state, **values):
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return state._replace(hyperparameters={**state.hyperparameters, **tensors})


@each_factory
def test_equals_the_transformation_with_these_values(factory, options):
    params = nested(seed=3)
    found = replayed(inject_hyperparams(factory)(**options), steps(), params)
    for updates, expected in zip(found, replayed(factory(**options), steps(), params), strict=True):
        close(updates, expected)


def test_kfac_with_schedules_and_live_changes():
    """In each step as the chain that is made with the values of this step, on one state."""
    layers, evaluate = layers_and_evaluate(MLP)
    rate, damping = exponential_decay(0.1, 1, 0.5), lambda step: 0.1 / (1 + step)
    tx = inject_hyperparams(low_rank_kfac)(
        layers, learning_rate=rate, rank=2, **{**OPTIONS, "damping": damping, "kl_clip": 1e9}
    )
    params, state = MLP.params, tx.init(MLP.params)
    inner = state.inner
    assert sorted(state.hyperparameters) == sorted([*OPTIONS, "learning_rate"])
    for i in range(4):
        e = evaluate(params)
        values = {**OPTIONS, "learning_rate": 0.1 * 0.5**i, "damping": 0.1 / (1 + i), "kl_clip": 1e9}
        if i == 2:
            state = changed(state, momentum=0.2)
        if i >= 2:
            values["momentum"] = 0.2
        by_hand = low_rank_kfac(layers, rank=2, **values)
        expected, inner = by_hand.update(e.grads, inner, params, evaluation=e)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        close(updates, expected, rtol=1e-6)  # the damping of the schedule, 1 over an integer, is float32
        assert {k: pytest.approx(float(x), rel=1e-6) for k, x in state.hyperparameters.items()} == values
        params = apply_updates(params, updates)
    assert state.steps == 4


def test_what_follows_a_schedule_is_set_anew():
    tx = inject_hyperparams(scale)(factor=lambda step: 2.0 + step)
    grads, state = nested(), tx.init(nested())
    for i in range(3):
        updates, state = tx.update(grads, changed(state, factor=100.0), grads)
        close(updates, optree.tree_map(lambda g, i=i: (2.0 + i) * g, grads))
        assert state.hyperparameters["factor"] == 2.0 + i


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


def test_a_grid_of_hyperparameters_by_vmap():
    layers, evaluate = layers_and_evaluate(MLP)
    tx, e = inject_hyperparams(low_rank_kfac)(layers, learning_rate=0.1, damping=0.1, rank=2), evaluate(MLP.params)
    damping = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    rate = torch.tensor([0.5, 0.1], dtype=torch.float64)

    def step(damping, rate):
        state = changed(tx.init(MLP.params))
        state = state._replace(hyperparameters={"damping": damping, "learning_rate": rate})
        return tx.update(e.grads, state, MLP.params, evaluation=e)[0]

    found = vmap(vmap(step, (None, 0)), (0, None))(damping, rate)
    for i, one in enumerate(damping):
        for j, other in enumerate(rate):
            by_hand = low_rank_kfac(layers, other.item(), damping=one.item(), rank=2)
            expected, _ = by_hand.update(e.grads, by_hand.init(MLP.params), MLP.params, evaluation=e)
            close(optree.tree_map(lambda x, i=i, j=j: x[i, j], found), expected, rtol=1e-9)


@pytest.mark.slow
def test_compiled_once_for_all_values():
    layers, evaluate = layers_and_evaluate(MLP)
    e = evaluate(MLP.params)
    tx = inject_hyperparams(low_rank_kfac)(layers, learning_rate=exponential_decay(0.1, 1, 0.5), damping=0.1, rank=100)

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


def kfac(**options):
    layers, _ = layers_and_evaluate(MLP)
    return inject_hyperparams(low_rank_kfac)(layers, **options)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: inject_hyperparams(lambda decay: decay)(decay=1.0), TypeError, "factory: .* got float"),
        (lambda: inject_hyperparams(trace)(0.9), TypeError, "expected a number, .* by keyword, .*got none"),
        (lambda: inject_hyperparams(trace)(decay=1.5), ValueError, "decay: expected a finite number in .* got 1.5"),
        (lambda: inject_hyperparams(trace)(decay=lambda step: 1.5), ValueError, "decay: expected .* got 1.5"),
        (lambda: inject_hyperparams(trace)(decay=lambda layer: layer.name), TypeError, "decay: .* a schedule"),
        (lambda: inject_hyperparams(trace)(decay=lambda step: "a"), TypeError, "decay: .* a schedule"),
        (lambda: inject_hyperparams(lrkfac.accumulate)(trace(0.9), every=2), TypeError, "every: .* got Tensor"),
        (lambda: kfac(learning_rate=0.1, rank=torch.tensor(3)), ValueError, "rank: expected a fixed integer.*shapes"),
        (lambda: kfac(learning_rate=0.1, rank=lambda step: 3), ValueError, "rank: expected a fixed integer.*shapes"),
        (lambda: scaled({"rate": 1.0}), ValueError, r"hyperparameters: expected \['factor'\], got \['rate'\]"),
        (
            lambda: scaled({"factor": torch.ones(2)}),
            ValueError,
            r"factor: expected a number or .* got the shape \(2,\)",
        ),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def scaled(values):
    tx = inject_hyperparams(scale)(factor=1.0)
    return tx.update(nested(), tx.init(nested())._replace(hyperparameters=values))
