"""``apply_if_finite``: a step that is not finite is as if it had not been."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import lrkfac
from lrkfac import apply_if_finite, apply_updates, chain, scale_by_adam, trace
from lrkfac.testing import check_transformation
from tests import cases
from tests.compiling import traced
from tests.transforms.test_base import close, nested, steps
from tests.transforms.test_precondition import layers_and_evaluate

MLP, GROUPS = cases.LINEAR[0], cases.CONVOLUTION[3]
INNER = chain(scale_by_adam(), trace(0.9), lrkfac.add_decayed_weights(0.1))
BAD = st.sampled_from([float("nan"), float("inf"), -float("inf")])


def spoiled(tree, value=float("nan"), leaf=1):
    """The tree with one entry that is not finite."""
    leaves, structure = optree.tree_flatten(optree.tree_map(torch.clone, tree))
    leaves[leaf].view(-1)[-1] = value
    return optree.tree_unflatten(structure, leaves)


def same(found, expected):
    assert optree.tree_all(optree.tree_map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 3])
def test_laws(dtype, number):
    check_transformation(apply_if_finite(INNER, number), nested(dtype))


@pytest.mark.parametrize("bad", [False, True])
def test_laws_with_kfac(bad):
    layers, evaluate = layers_and_evaluate(GROUPS)

    def evaluated(params):
        e = evaluate(params)
        e = e._replace(statistics=optree.tree_map(lambda x: x * float("nan"), e.statistics)) if bad else e
        return e.grads, {"evaluation": e}

    tx = apply_if_finite(lrkfac.low_rank_kfac(layers, 0.1, rank=2), 5)
    check_transformation(tx, GROUPS.params, evaluated)


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
        for found, wanted in zip(*both, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert (state.consecutive, state.total) == (row, total)


def faulty(evaluation, what, value):
    """An evaluation in which one thing is not finite."""
    if what == "grads":
        return evaluation._replace(grads=spoiled(evaluation.grads, value))
    if what == "loss":
        return evaluation._replace(loss=torch.full_like(evaluation.loss, value))
    field = "scale" if what == "scale" else what
    statistics = evaluation.statistics._replace(**{field: spoiled(getattr(evaluation.statistics, field), value, 0)})
    return evaluation._replace(statistics=statistics)


@pytest.mark.parametrize("what", ["grads", "loss", "inputs", "output_gradients", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make",
    [
        lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=2),
        lambda layers: lrkfac.kfac(layers, 0.1),
        lambda layers: lrkfac.precondition_by_fisher(layers, lrkfac.structures.full()),
        lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=2),
    ],
    ids=["low rank", "dense", "full", "adaptive"],
)
def test_a_step_of_kfac_that_is_not_finite_is_left_out(what, value, make):
    layers, evaluate = layers_and_evaluate(MLP)
    inner = make(layers)
    tx, params = apply_if_finite(inner, 2), MLP.params
    state, alone = tx.init(params), inner.init(params)
    for _ in range(2):
        e = evaluate(params)
        bad = faulty(e, what, value)
        updates, state = tx.update(bad.grads, state, params, evaluation=bad)
        same((updates, state.inner), (optree.tree_map(torch.zeros_like, params), alone))
        assert (state.consecutive, state.total) == (1, int(state.total))
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        expected, alone = inner.update(e.grads, alone, params, evaluation=e)
        same((updates, state.inner), (expected, alone))
        assert state.consecutive == 0
        params = apply_updates(params, updates)
    assert state.total == 2


def test_it_gives_up():
    """Statistics that stay bad are refused by the preconditioner, in its words."""
    layers, evaluate = layers_and_evaluate(MLP)
    tx, e = apply_if_finite(lrkfac.precondition_by_fisher(layers, rank=2), 2), evaluate(MLP.params)
    bad, state = faulty(e, "output_gradients", float("nan")), tx.init(MLP.params)
    for _ in range(2):
        _, state = tx.update(bad.grads, state, MLP.params, evaluation=bad)
    with pytest.raises(ValueError, match=r"no inverse of its factors: its statistics.* are not finite"):
        tx.update(bad.grads, state, MLP.params, evaluation=bad)


def test_what_comes_out_must_be_finite_too():
    tx = apply_if_finite(chain(lrkfac.scale(1e200), trace(0.9)), 3)
    state = tx.init(nested())
    huge = optree.tree_map(lambda g: 1e200 * g, nested())
    updates, after = tx.update(huge, state)
    same((updates, after.inner), (optree.tree_map(torch.zeros_like, huge), state.inner))
    assert after.total == 1


def test_each_model_of_an_ensemble_on_its_own():
    grads = nested()
    both = optree.tree_map(lambda *x: torch.stack(x), grads, spoiled(grads))
    tx = apply_if_finite(INNER, 2)
    updates, state = vmap(lambda g, s: tx.update(g, s, grads))(both, vmap(tx.init)(both))
    assert state.total.tolist() == [0, 1]
    close(optree.tree_map(lambda x: x[0], updates), tx.update(grads, tx.init(grads), grads)[0])
    same(optree.tree_map(lambda x: x[1], updates), optree.tree_map(torch.zeros_like, grads))


@pytest.mark.slow
def test_compiled_equals_eager():
    layers, evaluate = layers_and_evaluate(MLP)
    tx, e = apply_if_finite(lrkfac.low_rank_kfac(layers, 0.1, rank=100), 2), evaluate(MLP.params)

    def step(grads, state, statistics):
        return tx.update(grads, state, MLP.params, evaluation=e._replace(grads=grads, statistics=statistics))

    compiled = traced(step)
    state = tx.init(MLP.params)
    for bad in (False, True):
        given = (spoiled(e.grads) if bad else e.grads, state, e.statistics)
        found, expected = compiled(*given), step(*given)
        close(found, expected, rtol=1e-9)
        state = expected[1]
    assert state.total == 1


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: apply_if_finite(trace, 3), TypeError, "inner: expected a GradientTransformation, got function"),
        (lambda: apply_if_finite(INNER, 0), ValueError, "max_consecutive_errors: expected an integer >= 1, got 0"),
        (lambda: apply_if_finite(INNER, 1.0), TypeError, "max_consecutive_errors: expected an integer >= 1, got 1.0"),
        (lambda: apply_if_finite(INNER, True), TypeError, "max_consecutive_errors: expected an integer >= 1, got True"),
        (lambda: apply_if_finite(INNER, 1).update(nested(), ()), ValueError, "state: expected an ApplyIfFiniteState"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
