"""Dampings of blocks that are smaller by orders of magnitude; layers in turns, and how far factors turn."""

import functools
import math
import pickle

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import lrkfac
from lrkfac import factor_drift, precondition_by_fisher, round_robin_refresh
from lrkfac.core.curvature import stacking
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.blocks import initial_average, mean_eigenvalue_of
from lrkfac.linalg import to_dense
from lrkfac.structures import full, kronecker, layer_wise, low_rank, unit_wise
from tests.core.curvature import test_refresh
from tests.core.curvature.test_refresh import deep, drawing, problem

PRODUCTS = {name: test_refresh.STRUCTURES[name] for name in ("low rank", "dense", "diagonal")}
EXACT = {"unit-wise": unit_wise(), "layer-wise": layer_wise()}
PRODUCTS |= {"exactly damped": kronecker(low_rank(2), low_rank(2), exact_damping=True)}
STRUCTURES = PRODUCTS | {"corrected": kronecker(low_rank(2), low_rank(2), corrected=True)} | EXACT
close = functools.partial(test_refresh.close, atol=1e-12)
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


@functools.cache
def network(shares, width=5):
    """Equal layers on one input, of which each adds a share of its outputs: blocks in proportion to their squares."""
    draw = drawing(3)
    params = {f"l{i}": draw(width, width) / 2 for i in range(len(shares))}
    model = lambda p, x: sum(share * F.linear(x, p[f"l{i}"]) for i, share in enumerate(shares))  # noqa: E731
    layers, params, evaluate = problem(model, params, draw, (6, width), estimator="exact")
    return layers, params, evaluate(params)


def dampings(shares, structure=None, steps=2, balanced=True):
    """Of each block, the product of those of its factors, after some steps; and the last updates."""
    layers, params, e = network(shares)
    tx = precondition_by_fisher(layers, structure, decay=0.5, balanced=balanced)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(e.grads, state, params, evaluation=e, factor_damping=0.1)
    return {name: found.prod() for name, found in state.dampings.items()}, updates


@pytest.mark.parametrize("shares", [(1.0, 0.1, 0.0317), (1e-4,)])
@each_structure
def test_blocks_within_three_decades_have_one_damping(shares, structure):
    each, updates = dampings(shares, structure)
    close(list(each.values()), [torch.tensor(0.1, dtype=torch.float64)] * len(shares))
    close(updates, dampings(shares, structure, balanced=False)[1])


@each_structure
def test_beyond_damping_is_in_proportion_to_the_blocks(monkeypatch, structure):
    together = dampings((1.0, 0.1, 0.01), structure)
    close(together[0], {f"l{i}": torch.tensor(0.1 * 100.0**-i, dtype=torch.float64) for i in range(3)})
    monkeypatch.setitem(stacking.LARGEST, "cpu", 0)
    close(together, dampings((1.0, 0.1, 0.01), structure))


@pytest.mark.parametrize("shares, steps, expected", [
    ((1.0, math.sqrt(10**-3.25)), 2, [0.1, 0.1 * 10 ** (-3.25 / 2)]),  # halfway: the root of the proportion
    ((1.0, 1e-9, 0.0), 2, [0.1, 1e-7, 0.1]),  # no less than a millionth, but a silent block has it whole
    ((1.0, 1e-3), 1, [0.1, 0.1])])  # fmt: skip  # of the first statistics nothing is known
def test_between_and_at_the_ends(shares, steps, expected):
    each, updates = dampings(shares, STRUCTURES["dense"], steps=steps)
    assert [x.item() for x in each.values()] == pytest.approx(expected)
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(updates))


@pytest.mark.parametrize("structure", [*STRUCTURES.values(), full()], ids=[*STRUCTURES, "full"])
def test_mean_eigenvalue_is_that_of_the_explicit_block(structure):
    """``F = Σ_n a aᵀ ⊗ (diag(p) - p pᵀ) / N``, or the product of the means of both."""
    (layers, params, e), share = network((0.3,)), 0.3
    (x,) = e.statistics.inputs["l0"]
    p = torch.softmax(share * F.linear(x, params["l0"]), dim=-1)
    a, b = x.square().sum(-1), share**2 * (1 - p.square().sum(-1))
    expected = a.mean() * b.mean() if structure in PRODUCTS.values() else (a * b).mean()
    tx = precondition_by_fisher(layers, structure, decay=0.0)
    _, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
    (block,) = blocks(layers, structure, None)
    torch.testing.assert_close(mean_eigenvalue_of(block, state.factors[block.name]), expected / params["l0"].numel())


def test_of_groups_it_is_the_mean():
    structure, weight = STRUCTURES["low rank"], torch.randn(4, 6, 3, dtype=torch.float64)
    layers = lrkfac.find_layers(lambda p, x: F.conv1d(x, p, groups=2).mean(2), weight, torch.ones(5, 12, 6).double())
    (block,) = blocks(layers, structure, None)
    draw = lambda leaf: torch.rand_like(leaf) if leaf.is_floating_point() else leaf  # noqa: E731
    state = optree.tree_map(draw, initial_average(block, [weight]))
    # Their vectors are orthonormal.
    state = state._replace(input=state.input._replace(vectors=torch.linalg.qr(state.input.vectors).Q))
    each = vmap(lambda one: block.structure.operator(one).to_dense())(state)
    expected = each.diagonal(dim1=-2, dim2=-1).mean()
    torch.testing.assert_close(mean_eigenvalue_of(block, state), expected)


# Layers in turns: those named are refreshed as in a whole refresh, the others stand still -------------------

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
