"""Hyperparameters as trees: each parameter is treated as by the transformation with its own number."""

import optree
import pytest
import torch

import lrkfac
from tests import cases
from tests.transforms.test_base import Pair, flat, nested, replayed, steps
from tests.transforms.test_precondition import layers_and_evaluate

SCHEDULE = lrkfac.schedules.exponential_decay(0.3, 1, 0.5)
MAKE = {
    "trace": lrkfac.trace,
    "nesterov": lambda decay: lrkfac.trace(decay, nesterov=True),
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
    found = replayed(lrkfac.scale_by_learning_rate({"a": SCHEDULE, "b": 0.5}), grads)
    for i, (updates, g) in enumerate(zip(found, grads, strict=True)):
        torch.testing.assert_close(updates, {"a": -0.3 * 0.5**i * g["a"], "b": -0.5 * g["b"]})


MLP = cases.LINEAR[0]
RATES = {name: 0.1 * (i + 1) for i, name in enumerate(MLP.params)}


@pytest.mark.parametrize("rates", [RATES, {**RATES, next(iter(RATES)): lambda step: 0.1}], ids=["numbers", "schedule"])
def test_the_clip_bounds_the_length_of_the_step_that_is_taken(rates):
    """``Σ rate² uᵀ∇L`` over parameters is at most the bound, and equals it where the clip binds."""
    layers, evaluate = layers_and_evaluate(MLP)
    e, bound = evaluate(MLP.params), 1e-5
    plain = lrkfac.precondition_by_fisher(layers)
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
