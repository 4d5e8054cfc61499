"""An update in rounds: answers of parts of a batch add up to those of the batch, and few sums serve all layers."""

from functools import cache, partial

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import lrkfac
from lrkfac.core.base.processes import Among
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.blocks import by_group, initial_state
from lrkfac.core.curvature.refresh import refresh
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.structures import (
    dense,
    diagonal,
    full,
    kronecker,
    layer_wise,
    low_rank,
    low_rank_plus_diagonal,
    unit_wise,
)
from tests.core.curvature.test_custom_structure import TwoBlocks
from tests.lockstep import in_lockstep
from tests.tensors import normal

PARTS = {"unequal": (5, 9, 2), "one is empty": (7, 0, 9)}

# One factor -----------------------------------------------------------------------------------------------

FACTORS = {
    "dense": dense(),
    "diagonal": diagonal(),
    "low rank": low_rank(3),
    "low rank, none left": low_rank(3, residual="none"),
    "low rank, three steps": low_rank(3, iterations=3),
    "plus diagonal": low_rank_plus_diagonal(3),
    "plus diagonal, off diagonal": low_rank_plus_diagonal(3, fit="off_diagonal"),
    "plus diagonal, two steps": low_rank_plus_diagonal(3, iterations=2),
}


def rows_of(n, seed, *stack):
    return normal(*stack, n, 11, seed=seed) * torch.logspace(0, -2, 11).double()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("structure", FACTORS.values(), ids=FACTORS.keys())
def test_answers_of_parts_add_up(structure, stack, joint):
    """From a warm state, also of stacked factors; ``update`` is the composition."""
    state = structure.init(11 + joint, torch.zeros(()).double())
    state = optree.tree_map(lambda x: x.expand((*stack, *x.shape)).clone(), state)
    scale = torch.tensor(1 / 16).double()
    for seed in range(3):
        rows = rows_of(16, seed, *stack)
        parts = [RowCovariance(part, scale, joint) for part in rows.split((5, 9, 2), dim=-2)]
        carry = structure.begin(state, 0.7)
        for round in range(structure.rounds):
            answers = [structure.measure(structure.question(carry, round), part, round) for part in parts]
            summed = optree.tree_map(lambda *x: torch.stack(x).sum(0), *answers)
            carry = structure.advance(carry, summed, round)
        state = structure.update(state, RowCovariance(rows, scale, joint), 0.7)
        for i in range(2 if stack else 1):
            alone = [
                structure.operator(optree.tree_map(lambda x, i=i: x[i], s) if stack else s) for s in (carry, state)
            ]
            torch.testing.assert_close(alone[0].to_dense(), alone[1].to_dense(), rtol=1e-12, atol=1e-13)


def test_a_structure_without_an_update_says_what_is_missing():
    class Nothing(TwoBlocks):
        update = dense().__class__.__mro__[1].update

    with pytest.raises(NotImplementedError, match=r"Nothing: expected a method update\(\), or rounds"):
        Nothing().update(None, None, 0.9)


# All layers -----------------------------------------------------------------------------------------------


def images():
    """A convolution, a grouped one, a norm, linear layers of equal size, one with positions."""
    draw = partial(normal, seed=3)
    params = {
        "conv": {"w": draw(6, 2, 2, 2) / 3, "b": draw(6)},
        "grouped": {"w": draw(4, 3, 2, 2) / 3},
        "norm": {"w": 1 + draw(4) / 9, "b": draw(4)},
        "each": {"w": draw(8, 4), "b": draw(8)},
        **{f"l{i}": {"w": draw(8, 8) / 3, "b": draw(8)} for i in range(3)},
    }

    def model(p, x):
        x = torch.tanh(F.conv2d(x, p["conv"]["w"], p["conv"]["b"]))
        x = torch.tanh(F.conv2d(x, p["grouped"]["w"], groups=2)).flatten(2).mT
        x = F.layer_norm(x, (4,), p["norm"]["w"], p["norm"]["b"])
        x = torch.tanh(F.linear(x, p["each"]["w"], p["each"]["b"])).mean(1)
        for i in range(3):
            x = torch.tanh(F.linear(x, p[f"l{i}"]["w"], p[f"l{i}"]["b"]))
        return x

    return model, params, normal(16, 2, 4, 4), torch.arange(16) % 8


def tokens(tied):
    params = {"table": normal(9, 7, seed=1), "inner": {"w": normal(7, 7, seed=2), "b": normal(7, seed=3)}}
    params |= {} if tied else {"head": normal(9, 7, seed=4)}

    def model(p, x):
        x = F.embedding(x, p["table"])
        x = torch.tanh(F.linear(x, p["inner"]["w"], p["inner"]["b"])).mean(1)
        return F.linear(x, p["table"] if tied else p["head"])

    numbers = torch.randint(9, (16, 3), generator=torch.Generator().manual_seed(0))
    return model, params, numbers, torch.arange(16) % 9


MODELS = {"images": images, "tokens": partial(tokens, False), "tied tokens": partial(tokens, True)}
LOW_RANK = kronecker(low_rank(2), low_rank_plus_diagonal(2))
STRUCTURES = {
    "default": (LOW_RANK, 2),
    "reduce": (kronecker(low_rank(2), low_rank_plus_diagonal(2), treatment="reduce"), 2),
    "dense": (kronecker(dense(), dense()), 1),
    "mixed": (kronecker(dense(), low_rank(2, iterations=2)), 4),
    "corrected": (kronecker(low_rank(2), dense(), corrected=True), 3),
    "unit_wise": (unit_wise(), 1),
    "layer_wise": (layer_wise(), 1),
    "diagonal": (diagonal(), 1),
    "full": (full(), 1),
}


@cache
def statistics_of(make, estimator="empirical"):
    """Layers, parameters and the statistics of two batches."""
    model, params, x, y = make()
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)
    batches = [(params, x, y), (optree.tree_map(lambda p: 1.3 * p, params), x.flip(0), y)]
    return layers, optree.tree_leaves(params), [evaluate(*batch).statistics for batch in batches]


def part_of(statistics, first, last):
    """Rows of some examples; the scale stays that of all."""
    inputs = {name: tuple(a[first:last] for a in uses) for name, uses in statistics.inputs.items()}
    gradients = {name: tuple(g[:, first:last] for g in uses) for name, uses in statistics.output_gradients.items()}
    return statistics._replace(inputs=inputs, output_gradients=gradients)


def refreshed(assigned, states, batches, among=None, division=None):
    for statistics in batches:
        states = refresh(assigned, states, statistics, dict.fromkeys(states, 0.1), 0.7, among, division)
    return states


def start(assigned, leaves):
    return {block.name: initial_state(block, leaves) for block in assigned}


@cache
def of_whole_batches(make, structure):
    """The blocks with their states at the start, the statistics, and the states of one process with whole batches."""
    layers, leaves, batches = statistics_of(make)
    assigned = blocks(layers, structure, None)
    states = start(assigned, leaves)
    return assigned, states, batches, refreshed(assigned, states, batches)


def of_parts(assigned, states, batches, sizes):
    """States on each process, which has so many examples, and the processes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()

    def on(process):
        own = [part_of(one, ends[process.rank] - sizes[process.rank], ends[process.rank]) for one in batches]
        counts = torch.tensor([sizes[process.rank], sum(sizes)]).double()
        return refreshed(assigned, states, own, Among(process, *counts))

    return in_lockstep(len(sizes), on)


def matrices(block, state):
    """The average and what is applied, as matrices, which do not depend on signs and turns of vectors."""

    def dense_of(operator):
        units = getattr(block.structure, "per", None) == "unit"
        return vmap(lambda one: one.to_dense())(operator) if units else operator.to_dense()

    average = by_group(block, lambda one: dense_of(block.structure.operator(one)))(state.average)
    return average, by_group(block, dense_of)(state.inverse), state.dampings


def are_equal(assigned, found, expected):
    for block in assigned:
        pairs = zip(*(matrices(block, x[block.name]) for x in (found, expected)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize(
    "model, sizes",
    [(model, sizes) for model in MODELS for sizes in PARTS if (model, sizes) != ("tokens", "one is empty")],
)
@pytest.mark.parametrize("name", STRUCTURES)
def test_processes_with_parts_are_one_with_the_batch(model, name, sizes):
    """Equal bit for bit on all of them; so many sums in a refresh, whatever the number of layers."""
    structure, rounds = STRUCTURES[name]
    assigned, states, batches, expected = of_whole_batches(MODELS[model], structure)
    results, processes = of_parts(assigned, states, batches, PARTS[sizes])
    are_equal(assigned, results[0], expected)
    for other in results[1:]:
        pairs = zip(optree.tree_leaves(other), optree.tree_leaves(results[0]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert [len(one.calls) for one in processes] == [2 * rounds] * 3


@pytest.mark.parametrize("estimator", ["forward_only", "exact"])
def test_estimators(estimator):
    """Without gradients ``B`` is the identity, which is no part of any process."""
    layers, leaves, batches = statistics_of(MODELS["tokens"], estimator)
    assigned = blocks(layers, kronecker(low_rank(2), dense()), None)
    states = start(assigned, leaves)
    results, _ = of_parts(assigned, states, batches, (5, 9, 2))
    are_equal(assigned, results[2], refreshed(assigned, states, batches))


@pytest.mark.parametrize(
    "structure",
    [
        kronecker(TwoBlocks(), low_rank(2)),
        kronecker(low_rank(2, method="power"), low_rank_plus_diagonal(2, method="power", iterations=2)),
        kronecker(TwoBlocks(), dense(), corrected=True),
        kronecker(dense(), TwoBlocks(), treatment="reduce"),
    ],
    ids=["custom", "power", "custom, corrected", "custom, reduce"],
)
def test_structures_without_rounds_sum_each_answer(structure):
    for make in (MODELS["tokens"], MODELS["tied tokens"]):
        layers, leaves, batches = statistics_of(make)
        assigned = blocks(layers, structure, None)
        states = start(assigned, leaves)
        results, _ = of_parts(assigned, states, batches, (5, 9, 2))
        are_equal(assigned, results[0], refreshed(assigned, states, batches))


def test_numbers_that_are_summed():
    """``k (d_in + d_out) + 2 k² + d_out + 1`` of a layer."""
    params = {f"l{i}": {"w": normal(20, 20, seed=i) / 5, "b": normal(20)} for i in range(5)}

    def model(p, x):
        for one in p.values():
            x = torch.tanh(F.linear(x, one["w"], one["b"]))
        return x

    layers, leaves, batches = statistics_of(lambda: (model, params, normal(16, 20), torch.arange(16)))
    assigned = blocks(layers, LOW_RANK, None)
    _, processes = of_parts(assigned, start(assigned, leaves), batches[:1], (5, 9, 2))
    k = 2 + 4
    assert processes[0].calls == [5 * (k * (21 + 20) + 20 + 1), 5 * 2 * k * k]


def test_what_is_stacked_does_not_change_what_is_summed():
    """Inputs of two layers are of equal length on one process and of other lengths on another."""
    params = {"a": normal(6, 6), "b": normal(6, 6, seed=1)}
    model = lambda p, x: (x[0] @ p["a"]).mean(1) + (x[1] @ p["b"]).tanh().mean(1)  # noqa: E731
    lengths = ((3, 3), (2, 4))
    inputs = [tuple(normal(4, n, 6, seed=i) for i, n in enumerate(pair)) for pair in lengths]
    layers = lrkfac.find_layers(model, params, inputs[0])
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")
    own = [evaluate(params, x, torch.arange(4)).statistics for x in inputs]
    assigned = blocks(layers, LOW_RANK, None)
    states, counts = start(assigned, optree.tree_leaves(params)), torch.tensor([4.0, 8.0]).double()
    results, _ = in_lockstep(2, lambda one: refreshed(assigned, states, [own[one.rank]], Among(one, *counts)))
    assert all(map(torch.equal, *map(optree.tree_leaves, results)))
