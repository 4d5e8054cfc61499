"""``masked`` and ``partition``: each transformation acts as if its parameters were all there is."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import chain, identity, masked, partition, scale, scale_by_adam, trace
from lrkfac.testing import seeds
from tests import cases
from tests.transforms.test_base import Pair, close, flat, nested, replayed, steps
from tests.transforms.test_precondition import layers_and_evaluate
from tests.transforms.test_travel import mask as of_matrices

MLP, SHIFT = cases.LINEAR[0], cases.LINEAR[6]
INNER = chain(
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
    "function": (of_matrices, [True, False, False, False, False, True, True]),
}


@pytest.mark.parametrize("mask, own", MASKS.values(), ids=MASKS.keys())
def test_masked_equals_the_inner_one_on_its_leaves_alone(mask, own):
    params = nested(seed=3)
    part = lambda tree: [x for x, one in zip(optree.tree_leaves(tree), own, strict=True) if one]  # noqa: E731
    found = replayed(masked(INNER, mask), steps(), params)
    alone = replayed(INNER, [part(g) for g in steps()], part(params)) if any(own) else [[]] * 4
    for all_updates, expected, grads in zip(found, alone, steps(), strict=True):
        close(part(all_updates), expected)
        others = zip(optree.tree_leaves(all_updates), optree.tree_leaves(grads), own, strict=True)
        assert all(torch.equal(x, g) for x, g, one in others if not one)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=7, max_size=7), seeds)
def test_partition_equals_each_on_its_leaves_alone(chosen, seed):
    params, grads = nested(seed=seed), steps(3)
    labels = optree.tree_unflatten(optree.tree_structure(params), chosen)
    inner = {"a": INNER, "b": chain(trace(0.5), lrkfac.clip_by_global_norm(0.1)), "c": identity()}
    found = replayed(partition(inner, labels), grads, params)
    for label, tx in inner.items():
        part = lambda tree, label=label: [x for k, x in flat(tree).items() if chosen[k] == label]  # noqa: E731
        if label in chosen:
            alone = replayed(tx, [part(g) for g in grads], part(params))
            for updates, expected in zip(found, alone, strict=True):
                close(part(updates), expected)


def kfac_and_adam(layers):
    covered = optree.tree_map(lambda p: "kfac" if p.index in layers.covered else "adam", layers.tree)
    return partition(
        {"kfac": lrkfac.low_rank_kfac(layers, 0.1, rank=2), "adam": chain(scale_by_adam(), scale(-0.01))}, covered
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
