"""Layers in turns: those named are refreshed as in a whole refresh, the others stand still; how far factors turn."""

import math
import pickle

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import factor_drift, precondition_by_fisher, round_robin_refresh
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, full, kronecker, low_rank, unit_wise
from tests.core.curvature import test_refresh
from tests.core.curvature.test_refresh import close, deep

PRODUCTS = {name: test_refresh.STRUCTURES[name] for name in ("low rank", "dense", "diagonal")}
STRUCTURES = PRODUCTS | {"corrected": kronecker(low_rank(2), dense(), corrected=True), "unit-wise": unit_wise()}
ESTIMATORS = [*((name, "mc") for name in STRUCTURES), ("low rank", "exact"), ("corrected", "empirical")]


@pytest.mark.parametrize("name, estimator", ESTIMATORS)
def test_named_layers_alone_are_refreshed(name, estimator):
    layers, params, evaluate = deep(3, estimator=estimator)
    tx, e = precondition_by_fisher(layers, STRUCTURES[name]), evaluate(params)
    state = tx.update(e.grads, tx.init(params), params, evaluation=e)[1]
    moved = optree.tree_map(lambda p: 1.1 * p, params)
    some, every = (evaluate(moved, layers=asked) for asked in (("out", "l1"), None))
    found, whole = (tx.update(e.grads, state, moved, evaluation=e)[1] for e in (some, every))
    assert all(map(torch.equal, optree.tree_leaves(some.grads), optree.tree_leaves(every.grads)))
    for layer in ("l0", "l1", "l2", "out"):
        close(found.blocks[layer], (whole if layer in ("out", "l1") else state).blocks[layer])
    assert optree.tree_structure(found) == optree.tree_structure(state)
    assert found.since.tolist() == [1, 0, 1, 0] and whole.since.tolist() == [0, 0, 0, 0]


def test_one_block_of_all_layers_has_no_turns():
    layers, params, evaluate = deep(3)
    tx, e = precondition_by_fisher(layers, full()), evaluate(params, layers=("l0",))
    with pytest.raises(ValueError, match=r"full\(\) holds all layers together and cannot do without .*'l1'"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)


@given(depth=st.integers(1, 9), every=st.integers(1, 12))
def test_each_layer_has_one_turn_and_turns_are_spread(depth, every):
    params = {f"l{i}": torch.ones(2, 2) for i in range(depth)}
    layers = lrkfac.find_layers(lambda p, x: sum(x @ w for w in p.values()), params, torch.ones(3, 2))
    refreshed = round_robin_refresh(layers, every)
    assert refreshed(0) == tuple(layer.name for layer in layers)
    assert pickle.loads(pickle.dumps(refreshed)) == refreshed
    for step in (torch.tensor(3), 2.0, True, "3", -1):
        with pytest.raises((TypeError, ValueError), match="step: expected an integer >= 0"):
            refreshed(step)
    turns = [refreshed(step) for step in range(every, 2 * every)]
    named = [names for names in turns if names]
    assert sorted(name for names in named for name in names) == [f"l{i}" for i in range(depth)]
    assert max(len(names) for names in named) == math.ceil(depth / every)
    at = [i for i, names in enumerate(turns) if names]
    gaps = [b - a for a, b in zip(at, [*at[1:], at[0] + every], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert turns == [refreshed(step) for step in range(2 * every, 3 * every)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", STRUCTURES)
def test_drift_is_the_angle_between_matrices(name, dtype):
    layers, params, evaluate = deep(3)
    tx, states, moved = precondition_by_fisher(layers, STRUCTURES[name], decay=0.3), [], params
    state = start = tx.init(params)
    for _ in range(2):
        state = tx.update((e := evaluate(moved)).grads, state, params, evaluation=e)[1]
        states.append(optree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, state.factors))
        moved = optree.tree_map(lambda p: 2 * p, params)
    for layer, angle in factor_drift(*states).items():
        assert 1e-3 < angle <= math.pi / 2
        if name in PRODUCTS:
            fitted, expected = STRUCTURES[name].fitted(layers[layer].d_in, layers[layer].d_out), []
            for m, n in zip(*[map(to_dense, fitted.operator(factors[layer])) for factors in states], strict=True):
                expected.append(torch.acos((m * n).sum() / (m.norm() * n.norm())).item())
            assert abs(angle - max(expected)) <= (1e-6 if dtype == torch.float64 else 2e-3)
    assert all(angle <= 3e-3 for angle in factor_drift(states[0], states[0]).values())
    assert all(angle == 0 for angle in factor_drift(start.factors, start.factors).values())
