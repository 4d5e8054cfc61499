"""Costs before training: bytes are those of the state, operations those that a step is counted to take."""

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lrkfac
from lrkfac import explain, find_layers, precondition_by_fisher
from lrkfac.core.curvature import costs, ranks
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal, unit_wise
from tests.transforms.test_precondition import GROUPS, MLP, SHIFT, STRIDE, cast, layers_and_evaluate

STRUCTURES = {
    "low rank": {"rank": 2},
    "auto": {"rank": "auto"},
    "by name": {"rank": {"0": 1, "*": 2}},
    "mixed": {"structure": {"0": kronecker(dense(), diagonal())}, "rank": 1},
    "corrected": {"structure": kronecker(low_rank(2), dense(), corrected=True)},
    "exactly damped": {"structure": kronecker(low_rank(2), low_rank_plus_diagonal(2), exact_damping=True)},
    "unit": {"structure": unit_wise()},
    "layer": {"structure": layer_wise()},
    "full": {"structure": full()},
}
OTHERS = (SHIFT, "auto", torch.float64), (STRIDE, "mixed", torch.bfloat16), (GROUPS, "corrected", torch.float64)
OF_STATE = [*[(MLP, name, torch.float64) for name in STRUCTURES], (MLP, "auto", torch.bfloat16), *OTHERS]


def size(tree):
    return sum(x.numel() * x.element_size() for x in optree.tree_leaves(tree))


@pytest.mark.parametrize("case, name, dtype", OF_STATE)
def test_bytes_are_those_of_the_state(case, name, dtype):
    """Of each layer and in all, at the start and after a step; the dtype is that of the parameters."""
    options, case = STRUCTURES[name], cast(case, dtype)
    layers, evaluate = layers_and_evaluate(case)
    tx, explanation = precondition_by_fisher(layers, **options), explain(layers, **options)
    states = [tx.init(case.params)]
    if dtype == torch.float64:
        assert str(explain(layers, dtype=dtype, **options)) == str(explanation)
        e = evaluate(case.params)
        states.append(tx.update(e.grads, states[0], case.params, evaluation=e)[1])
    for state in states:
        assert explanation.total.bytes == size(state)
        of_layers = {name: size(block) for name, block in state.blocks.items()}
        assert {name: cost.bytes for name, cost in explanation.layers.items()} == of_layers


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(1, 40), st.booleans())
def test_memory_is_linear_in_the_widths(d_in, d_out, groups, rank, bias):
    """At most ``(r + 2)(d_in + d_out + 2)`` numbers for a pair of factors, as many for their inverses."""
    params = {"w": torch.ones(groups * d_out, d_in, 3), **({"b": torch.ones(groups * d_out)} if bias else {})}
    model = lambda p, x: F.conv1d(x, p["w"], p.get("b"), groups=groups)  # noqa: E731
    inputs = torch.ones(2, groups * d_in, 4)
    layers = find_layers(model, params, inputs)
    tx = precondition_by_fisher(layers, rank=rank)
    e = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "empirical")(params, inputs, model(params, inputs))
    start = tx.init(params)
    for state in (start, tx.update(e.grads, start, params, evaluation=e)[1]):
        for layer in layers:
            bound = layer.groups * (rank + 2) * (layer.d_in + layer.d_out + 2)
            for part in (state.factors, state.inverses):
                leaves = optree.tree_leaves(part[layer.name])
                storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves}
                # float32, and the counts of batches in int64
                assert sum(storages.values()) <= 4 * bound + 8 * layer.groups


def counted(f):
    """Operations, by formulas of shapes in place of tensors, as torch's counter wants them."""

    def by_shapes(formula):
        return lambda shape, *args, **options: formula(torch.empty(shape, device="meta"), *args)

    own = {operation: by_shapes(formula) for operation, formula in costs._formulas().items()}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        f()
    return counter.get_total_flops()


LINEAR = [(MLP, STRUCTURES[name], 0) for name in ("low rank", "auto", "by name", "mixed", "corrected")]
# torch counts the backward pass of a grouped convolution once for each group.
APPROXIMATE = [(STRIDE, {"rank": 2}, 0.1), (GROUPS, {"rank": 1}, 0.5), (MLP, STRUCTURES["unit"], 0.1)]


@pytest.mark.parametrize("case, options, tolerance", LINEAR + APPROXIMATE)
def test_operations_are_those_that_torch_counts_in_a_step(case, options, tolerance):
    """Exactly for linear layers; within a tenth where the constant inputs of biases or examples' gradients differ."""
    layers, evaluate = layers_and_evaluate(case, "empirical")
    tx, found = precondition_by_fisher(layers, **options), explain(layers, **options)
    state, e = tx.init(case.params), evaluate(case.params)
    both = (e, e._replace(statistics=None))
    whole, plain = (counted(lambda e=e: tx.update(e.grads, state, case.params, evaluation=e)) for e in both)
    assert found.total.apply == plain
    rows = {x.name: e.statistics.output_gradients[x.name][0].numel() // (x.d_out * x.groups) for x in layers}
    expected = sum(cost.refresh + rows[name] * cost.refresh_per_row for name, cost in found.layers.items())
    assert abs(whole - plain - expected) <= tolerance * expected


@pytest.mark.parametrize("d_in, d_out, joint", [(1, 1, False), (3, 20, True), (30, 17, False), (17, 17, True)])
def test_operations_by_hand(d_in, d_out, joint):
    """Dense factors: Cholesky and inverse, ``rowsᵀ rows``, two products."""
    params = {"w": torch.ones(d_out, d_in), **({"b": torch.ones(d_out)} if joint else {})}
    layers = find_layers(lambda p, x: F.linear(x, p["w"], p.get("b")), params, torch.ones(2, d_in))
    a, b = d_in + joint, d_out
    (cost,) = explain(layers, kronecker(dense(), dense())).layers.values()
    assert abs(cost.refresh - a**3 - b**3) <= 4
    assert cost.refresh_per_row == 2 * a * a + 2 * b * b and cost.apply == 2 * b * b * a + 2 * b * a * a


WIDE = {"w": torch.ones(50, 40), "v": torch.ones(30, 50), "u": torch.ones(3, 30), "s": torch.ones(50)}
WIDE_LAYERS = find_layers(lambda p, x: (p["s"] * (x @ p["w"].T)) @ p["v"].T @ p["u"].T, WIDE, torch.ones(2, 40))


def of(rank):
    return ranks._bytes(WIDE_LAYERS, None, rank, torch.float32, {})


@settings(max_examples=10)
@given(st.integers(3000, 200_000))
def test_a_budget_is_kept_and_used(budget):
    """No common rank above the least would fit, nor one more for any layer that has the least."""
    if budget < of(1):
        with pytest.raises(ValueError, match=f"budget: expected at least {of(1)} bytes"):
            ranks.ranks_within(WIDE_LAYERS, None, budget, torch.float32)
        return
    found = ranks.ranks_within(WIDE_LAYERS, None, budget, torch.float32)
    assert set(found) == {layer.name for layer in WIDE_LAYERS if layer.kind == "linear"}
    assert size(precondition_by_fisher(WIDE_LAYERS, rank=found).init(WIDE)) == of(found) <= budget
    low = min(found.values())
    assert set(found.values()) <= {low, low + 1}
    if low < 50:
        assert of(low + 1) > budget
        assert all(of({**found, name: low + 1}) > budget for name, r in found.items() if r == low)


@pytest.mark.parametrize("d_in, d_out, rank", [(900, 800, ranks.LARGEST), (40, 1, 1)])
def test_auto_takes_no_more_than_the_averages_of_adam(d_in, d_out, rank):
    numbers = sum(x.numel() for x in WIDE.values())
    found = ranks.resolved(WIDE_LAYERS, None, "auto")
    assert found == explain(WIDE_LAYERS, budget=4 * ranks.COPIES * numbers).ranks
    layers = find_layers(lambda p, x: x @ p, torch.ones(d_in, d_out), torch.ones(2, d_in))
    assert set(ranks.resolved(layers, None, "auto").values()) == {rank}
    layers = find_layers(lambda p, x: x * p, scale := torch.ones(4), torch.ones(5, 4))
    assert explain(layers, rank="auto").ranks == {}
    plain, auto = (lrkfac.low_rank_kfac(layers, 0.1, **rank).init(scale) for rank in ({}, {"rank": "auto"}))
    assert optree.tree_all(optree.tree_map(torch.equal, plain, auto))


@pytest.mark.parametrize("make", [lrkfac.precondition_by_fisher, lrkfac.adaptive_low_rank_kfac])
@pytest.mark.parametrize("rank", ["auto", {"0": 1, "*": 2}, {"2": 1}])
def test_ranks_reach_the_state(make, rank):
    layers, _ = layers_and_evaluate(MLP)
    told = explain(layers, rank=rank).ranks
    by_hand = lambda layer: kronecker(low_rank(told[layer.name]), low_rank_plus_diagonal(told[layer.name]))  # noqa: E731
    found, expected = make(layers, rank=rank).init(MLP.params), precondition_by_fisher(layers, by_hand).init(MLP.params)
    factors = found.factors if make is precondition_by_fisher else found[0].preconditioner.factors
    assert optree.tree_all(optree.tree_map(torch.equal, factors, expected.factors))


def test_print_and_refusals():
    lines = str(explain(WIDE_LAYERS, rank=4)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [layer.name for layer in WIDE_LAYERS] + ["all"]
    assert "A rank 4, B rank 4 + diagonal" in lines[2] and "dense per unit" in str(lines)
    for words, options in {
        "budget: expected rank or budget, got both": {"rank": 2, "budget": 10**6},
        "rank: the pattern 's' matches none of the layers": {"rank": {"s": 2}},
        "rank: the pattern 'v' decides for no layer": {"rank": {"*": 2, "v": 3}},
    }.items():
        with pytest.raises(ValueError, match=words):
            explain(WIDE_LAYERS, **options)
