"""``masked`` and ``partition``: each transformation acts as if its parameters were all there is."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import apply_updates, chain, identity, masked, partition, scale, scale_by_adam, trace
from lrkfac.testing import check_transformation, seeds
from tests import cases, reference_optimizers
from tests.compiling import traced
from tests.transforms.test_base import Pair, close, flat, nested, replayed, steps
from tests.transforms.test_precondition import layers_and_evaluate

MLP, SHIFT = cases.LINEAR[0], cases.LINEAR[6]
SEVERAL = chain(
    lrkfac.add_decayed_weights(0.1), lrkfac.clip_by_global_norm(0.5), scale_by_adam(), trace(0.9), scale(-0.1)
)
MASKS = {
    "whole tree": (
        {"a": True, "blocks": [False, (True, Pair(True, False))], "one": (False,), "w": True},
        [True, False, True, True, False, False, True],
    ),
    "ends earlier": (
        {"a": False, "blocks": [False, True], "one": True, "w": True},
        [False, False, True, True, True, True, True],
    ),
    "all": (True, [True] * 7),
    "none": (False, [False] * 7),
    "function": (
        lambda tree: optree.tree_map(lambda x: x.ndim == 2, tree),
        [True, False, False, False, False, True, True],
    ),
}
each_mask = pytest.mark.parametrize("mask, own", MASKS.values(), ids=MASKS.keys())


@each_mask
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_laws(mask, own, dtype):
    check_transformation(masked(SEVERAL, mask), nested(dtype))


@each_mask
def test_masked_equals_the_inner_one_on_its_leaves_alone(mask, own):
    params = nested(seed=3)
    part = lambda tree: [x for x, one in zip(optree.tree_leaves(tree), own, strict=True) if one]  # noqa: E731
    found = replayed(masked(SEVERAL, mask), steps(), params)
    alone = replayed(SEVERAL, [part(g) for g in steps()], part(params)) if any(own) else [[]] * 4
    for all_updates, expected, grads in zip(found, alone, steps(), strict=True):
        close(part(all_updates), expected)
        others = zip(optree.tree_leaves(all_updates), optree.tree_leaves(grads), own, strict=True)
        assert all(torch.equal(x, g) for x, g, one in others if not one)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=7, max_size=7), seeds)
def test_partition_equals_each_on_its_leaves_alone(chosen, seed):
    params, grads = nested(seed=seed), steps(3)
    labels = optree.tree_unflatten(optree.tree_structure(params), chosen)
    inner = {"a": SEVERAL, "b": chain(trace(0.5), lrkfac.clip_by_global_norm(0.1)), "c": identity()}
    found = replayed(partition(inner, labels), grads, params)
    for label, tx in inner.items():
        part = lambda tree, label=label: [x for k, x in flat(tree).items() if chosen[k] == label]  # noqa: E731
        if label in chosen:
            alone = replayed(tx, [part(g) for g in grads], part(params))
            for updates, expected in zip(found, alone, strict=True):
                close(part(updates), expected)


def test_partition_equals_the_references():
    """Adam and momentum, in plain torch."""
    grads = [{"w": torch.randn(3, 2).double(), "b": torch.randn(2).double()} for _ in range(5)]
    tx = partition({"adam": scale_by_adam(), 1: trace(0.9)}, {"w": 1, "b": "adam"})
    momentum = reference_optimizers.momentum_trace([{"w": g["w"]} for g in grads], 0.9)
    adam = reference_optimizers.adam([{"b": g["b"]} for g in grads])
    for updates, one, other in zip(replayed(tx, grads), momentum, adam, strict=True):
        close(updates, {**one, **other})


def kfac_and_adam(layers, labels=None):
    covered = optree.tree_map(lambda p: "kfac" if p.index in layers.covered else "adam", layers.tree)
    return partition(
        {"kfac": lrkfac.low_rank_kfac(layers, 0.1, rank=2), "adam": chain(scale_by_adam(), scale(-0.01))},
        labels or covered,
    )


def test_kfac_for_what_layers_cover_and_adam_for_the_rest():
    """The one uncovered parameter counts in neither the clip nor the momentum of K-FAC."""
    layers, evaluate = layers_and_evaluate(SHIFT)
    tx, params = kfac_and_adam(layers), SHIFT.params
    kfac = chain(masked(identity(), True), lrkfac.low_rank_kfac(layers, 0.1, rank=2))
    state, alone, adam = tx.init(params), kfac.init(params), scale_by_adam().init(params)
    for i in range(3):
        e = evaluate(params, statistics=i != 1)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        without = {**e.grads, "1.shift": torch.zeros_like(e.grads["1.shift"])}
        expected, alone = kfac.update(without, alone, params, evaluation=e._replace(grads=without))
        other, adam = scale_by_adam().update(e.grads, adam)
        close(updates, {**expected, "1.shift": -0.01 * other["1.shift"]})
        params = apply_updates(params, updates)


@pytest.mark.parametrize("labels", [None, lambda tree: {k: "kfac" if x.ndim == 2 else "adam" for k, x in tree.items()}])
def test_laws_with_kfac(labels):
    layers, evaluate = layers_and_evaluate(SHIFT)
    check_transformation(
        kfac_and_adam(layers, labels), SHIFT.params, lambda p: ((e := evaluate(p)).grads, {"evaluation": e})
    )


def test_the_evaluation_is_that_of_the_own_parameters():
    """A quadratic model of some parameters is that of a function of these parameters, the others fixed."""
    seen = {}

    def update(updates, state, params=None, *, evaluation, **extra):
        seen.update(e=evaluation, params=params)
        return updates, state

    _, evaluate = layers_and_evaluate(MLP)
    mask = {name: name.startswith("2") for name in MLP.params}
    tx = masked(lrkfac.GradientTransformation(lambda p: (), update), mask)
    whole, direction = evaluate(MLP.params), optree.tree_map(torch.cos, MLP.params)
    only = lambda tree: {k: x if mask[k] else torch.zeros_like(x) for k, x in tree.items()}  # noqa: E731
    tx.update(whole.grads, tx.init(MLP.params), MLP.params, evaluation=whole)
    close(seen["params"], only(MLP.params), rtol=0)
    close(seen["e"].grads, only(whole.grads), rtol=0)
    close(seen["e"].product(direction), only(whole.product(only(direction))))
    close(seen["e"].quadratic(direction, direction), whole.quadratic(only(direction), only(direction)))
    stacked = optree.tree_map(lambda x: torch.stack([x, 2 * x]), direction)
    close(seen["e"].gram(stacked), whole.gram(only(stacked)))
    moved = {k: x + 0.1 if mask[k] else x for k, x in MLP.params.items()}
    close(seen["e"].loss_at(optree.tree_map(lambda p: p + 0.1, seen["params"])), whole.loss_at(moved), rtol=0)


def test_a_quadratic_model_of_some_parameters():
    layers, evaluate = layers_and_evaluate(MLP)
    mask = {name: name[0] in "24" for name in MLP.params}
    tx = masked(lrkfac.scale_by_quadratic_model(lrkfac.precondition_by_fisher(layers)), mask)
    params, state = MLP.params, tx.init(MLP.params)
    for _ in range(5):
        e = evaluate(params)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = apply_updates(params, {k: u if mask[k] else 0 * u for k, u in updates.items()})
        change = evaluate(params, statistics=False).loss - e.loss
        assert change < 0
        torch.testing.assert_close(change, state.inner.reduction_ratio * state.inner.predicted, rtol=1e-8, atol=0)


@pytest.mark.slow
def test_compiled_equals_eager():
    layers, evaluate = layers_and_evaluate(SHIFT)
    tx, e = kfac_and_adam(layers), evaluate(SHIFT.params)
    tx = chain(tx, masked(scale(2.0), lambda tree: {k: x.ndim == 2 for k, x in tree.items()}))

    def step(grads, state, statistics):
        return tx.update(grads, state, SHIFT.params, evaluation=e._replace(grads=grads, statistics=statistics))

    given = (e.grads, tx.init(SHIFT.params), e.statistics)
    found = traced(step)(*given)
    close(found, step(*given), rtol=1e-9)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: masked(scale, True), TypeError, "inner: expected a GradientTransformation, got function"),
        (lambda: masked(identity(), {"w": 1}), TypeError, "mask: expected True or False for 'w', got 1"),
        (lambda: masked(identity(), {"w": torch.tensor(True)}), TypeError, "mask: .* for 'w', got tensor"),
        (lambda: masked(identity(), {"v": True}), ValueError, "mask: expected a tree like the parameters"),
        (lambda: masked(identity(), {"w": None}), ValueError, "mask: expected a tree like the parameters"),
        (lambda: masked(identity(), {"w": [True, False]}), ValueError, "mask: expected a tree like the parameters"),
        (lambda: partition({"a": 1}, "a"), TypeError, r"transformations\['a'\]: expected a GradientTransformation"),
        (lambda: partition({"a": identity()}, {"w": "b"}), ValueError, r"labels: .* \['a'\] for 'w', got 'b'"),
        (lambda: partition({"a": identity()}, {}), ValueError, "labels: expected a tree like the parameters"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make().init({"w": torch.ones(2)})


@pytest.mark.parametrize("tx", [masked(identity(), True), partition({"a": identity(), "b": identity()}, "a")])
@pytest.mark.parametrize("state", [(), None, partition({"a": identity()}, "a").init({})])
def test_the_state_of_another_is_refused(tx, state):
    with pytest.raises(ValueError, match=r"state: expected a (Masked|Partition)State.*got.*pass what init"):
        tx.update(nested(), state)
