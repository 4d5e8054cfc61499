"""Layers in turns: those named are refreshed as in a whole refresh, the others stand still; how far factors turn."""

import math
import pickle

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import precondition_by_fisher, round_robin_refresh
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal

D = 7
STRUCTURES = {
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(2)),
    "dense": kronecker(dense(), dense()),
    "diagonal": kronecker(diagonal(), diagonal()),
    "corrected": kronecker(low_rank(2), dense(), corrected=True),
    "unit-wise": lrkfac.structures.unit_wise(),
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


def problem(depth=4, estimator="mc"):
    generator = torch.Generator().manual_seed(depth)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = {f"l{i}": draw(D, D) / 2 for i in range(depth)}

    def model(p, x):
        for i in range(depth):
            x = torch.tanh(F.linear(x, p[f"l{i}"]))
        return x

    x, y = draw(5, D), torch.randint(D, (5,), generator=generator)
    noise = torch.rand(1, 5, D, generator=generator, dtype=torch.float64) if estimator == "mc" else None
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)
    return layers, params, lambda p, asked=None: evaluate(p, x, y, layers=asked, noise=noise)


@each_structure
@pytest.mark.parametrize("estimator", ["mc", "empirical", "exact"])
def test_named_layers_alone_are_refreshed(structure, estimator):
    layers, params, evaluate = problem(estimator=estimator)
    tx = precondition_by_fisher(layers, structure)
    e = evaluate(params, None)
    state = tx.update(e.grads, tx.init(params), params, evaluation=e)[1]
    moved = optree.tree_map(lambda p: 1.1 * p, params)
    some, every = (evaluate(moved, asked) for asked in (("l3", "l1"), None))
    found, whole = (tx.update(e.grads, state, moved, evaluation=e)[1] for e in (some, every))
    assert all(map(torch.equal, optree.tree_leaves(some.grads), optree.tree_leaves(every.grads)))
    for name in ("l0", "l1", "l2", "l3"):
        expected = whole if name in ("l1", "l3") else state
        for a, b in zip(*[optree.tree_leaves(state.blocks[name]) for state in (found, expected)], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert optree.tree_structure(found) == optree.tree_structure(state)
    assert found.since.tolist() == [1, 0, 1, 0] and whole.since.tolist() == [0, 0, 0, 0]


def test_one_block_of_all_layers_has_no_turns():
    layers, params, evaluate = problem()
    tx, e = precondition_by_fisher(layers, lrkfac.structures.full()), evaluate(params, ("l0",))
    with pytest.raises(ValueError, match=r"full\(\) holds all layers together and cannot do without .*'l1'"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)


@given(depth=st.integers(1, 9), every=st.integers(1, 12))
def test_each_layer_has_one_turn_and_turns_are_spread(depth, every):
    layers = problem(depth)[0]
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


@pytest.mark.parametrize("structure, dtype", [(structure, torch.float64) for structure in STRUCTURES.values()] + [
    (STRUCTURES[name], torch.float32) for name in ("low rank", "dense", "diagonal")])  # fmt: skip
def test_drift_is_the_angle_between_matrices(structure, dtype):
    layers, params, evaluate = problem()
    tx, states = precondition_by_fisher(layers, structure, decay=0.3), []
    state = tx.init(params)
    for scale in (1.0, 2.0):
        e = evaluate(optree.tree_map(lambda p, scale=scale: scale * p, params), None)
        state = tx.update(e.grads, state, params, evaluation=e)[1]
        states.append(optree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, state.factors))
    found = lrkfac.factor_drift(*states)
    assert set(found) == {"l0", "l1", "l2", "l3"}
    for name, angle in found.items():
        if structure in (STRUCTURES["low rank"], STRUCTURES["dense"], STRUCTURES["diagonal"]):
            pairs = [
                [held.operator(state).to_dense() for state in (states[0][name][i], states[1][name][i])]
                for i, held in enumerate((structure.output.fitted(D), structure.input.fitted(D)))
            ]
            expected = max(torch.acos((m * n).sum() / (m.norm() * n.norm())).item() for m, n in pairs)
            assert abs(angle.item() - expected) <= (1e-6 if dtype == torch.float64 else 2e-3)
        assert 1e-3 < angle.item() <= math.pi / 2
    assert all(angle <= 3e-3 for angle in lrkfac.factor_drift(states[0], states[0]).values())
    start = tx.init(params).factors
    assert all(angle == 0 for angle in lrkfac.factor_drift(start, start).values())
