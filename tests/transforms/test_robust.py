"""``apply_if_finite``: a step that is not finite is as if it had not been."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import lrkfac
from lrkfac import apply_if_finite, apply_updates, chain, scale_by_adam, trace
from tests.transforms.test_base import close, nested, steps
from tests.transforms.test_travel import CASE, EVALUATE, TRANSFORMATIONS

NAN, INF = float("nan"), float("inf")
INNER = chain(scale_by_adam(), trace(0.9), lrkfac.add_decayed_weights(0.1))
BAD = st.sampled_from([NAN, INF, -INF])


def spoiled(tree, value=float("nan"), leaf=1):
    leaves, structure = optree.tree_flatten(optree.tree_map(torch.clone, tree))
    leaves[leaf].view(-1)[-1] = value
    return optree.tree_unflatten(structure, leaves)


def same(found, expected):
    assert optree.tree_all(optree.tree_map(torch.equal, found, expected))


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 4), BAD, st.integers(1, 6))
def test_equals_the_loop(finite, most, value, leaf):
    """The loop branches: bad steps are passed over, up to ``most`` in a row."""
    params, grads = nested(), steps(len(finite))
    tx, inner = apply_if_finite(INNER, most), INNER.init(params)
    state, row, total = tx.init(params), 0, 0
    for ok, g in zip(finite, grads, strict=True):
        g = g if ok else spoiled(g, value, leaf)
        updates, state = tx.update(g, state, params)
        expected, after = INNER.update(g, inner, params)
        # Once something bad was let through, it stays in the averages.
        good = ok and all(x.isfinite().all() for x in optree.tree_leaves(expected))
        row, total = (0, total) if good else (row + 1, total + 1)
        if good or row > most:
            inner = after
        else:
            expected = optree.tree_map(torch.zeros_like, g)
        both = optree.tree_leaves((updates, state.inner)), optree.tree_leaves((expected, inner))
        torch.testing.assert_close(*both, rtol=0, atol=0, equal_nan=True)
        assert (state.consecutive, state.total) == (row, total)


def faulty(evaluation, what, value):
    if what == "grads":
        return evaluation._replace(grads=spoiled(evaluation.grads, value))
    if what == "loss":
        return evaluation._replace(loss=torch.full_like(evaluation.loss, value))
    statistics = evaluation.statistics._replace(**{what: spoiled(getattr(evaluation.statistics, what), value, 0)})
    return evaluation._replace(statistics=statistics)


FAULTS = {"grads": NAN, "loss": INF, "inputs": NAN, "output_gradients": INF, "scale": NAN}


@pytest.mark.parametrize("what, value", FAULTS.items(), ids=FAULTS.keys())
@pytest.mark.parametrize("name", ["low_rank_kfac", "kfac", "whole", "adaptive_low_rank_kfac"])
def test_a_step_of_kfac_that_is_not_finite_is_left_out(what, value, name):
    inner, params = TRANSFORMATIONS[name], CASE.params
    tx = apply_if_finite(inner, 2)
    state, alone = tx.init(params), inner.init(params)
    for total in (1, 2):
        e = EVALUATE(params)
        bad = faulty(e, what, value)
        updates, state = tx.update(bad.grads, state, params, evaluation=bad)
        same((updates, state.inner), (optree.tree_map(torch.zeros_like, params), alone))
        assert (state.consecutive, state.total) == (1, total)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        expected, alone = inner.update(e.grads, alone, params, evaluation=e)
        same((updates, state.inner), (expected, alone))
        assert state.consecutive == 0
        params = apply_updates(params, updates)


def test_it_gives_up():
    tx, e = apply_if_finite(TRANSFORMATIONS["low rank"], 2), EVALUATE(CASE.params)
    bad, state = faulty(e, "output_gradients", float("nan")), tx.init(CASE.params)
    for _ in range(2):
        _, state = tx.update(bad.grads, state, CASE.params, evaluation=bad)
    with pytest.raises(ValueError, match=r"no inverse of its factors: its statistics.* are not finite"):
        tx.update(bad.grads, state, CASE.params, evaluation=bad)


def test_each_model_of_an_ensemble_on_its_own():
    """Also where finite gradients become updates that are not."""
    tx, grads = apply_if_finite(chain(lrkfac.scale(1e200), trace(0.9)), 2), nested()
    huge = optree.tree_map(lambda g: 1e200 * g, grads)
    each = optree.tree_map(lambda *x: torch.stack(x), grads, spoiled(grads), huge)
    updates, state = vmap(tx.update)(each, vmap(tx.init)(each))
    assert state.total.tolist() == [0, 1, 1]
    close(optree.tree_map(lambda x: x[0], updates), tx.update(grads, tx.init(grads))[0])
    for i in (1, 2):
        left = optree.tree_map(lambda x, i=i: x[i], (updates, state.inner))
        same(left, (optree.tree_map(torch.zeros_like, grads), tx.init(grads).inner))
