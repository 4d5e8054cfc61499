"""Costs before training: bytes are those of the state, operations those that a step is counted to take."""

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lrkfac
from lrkfac import explain, precondition_by_fisher
from lrkfac.core.curvature import costs, ranks
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from tests import cases
from tests.transforms.test_precondition import cast, layers_and_evaluate

MLP, SHIFT, STRIDE, GROUPS = cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[0], cases.CONVOLUTION[3]
STRUCTURES = {
    "low rank": {"rank": 2},
    "auto": {"rank": "auto"},
    "by name": {"rank": {"0": 1, "*": 2}},
    "mixed": {"structure": {"0": kronecker(dense(), diagonal())}, "rank": 1},
    "corrected": {"structure": kronecker(low_rank(2), dense(), corrected=True)},
    "unit": {"structure": lrkfac.structures.unit_wise()},
    "layer": {"structure": lrkfac.structures.layer_wise()},
    "full": {"structure": lrkfac.structures.full()},
}


def size(tree):
    return sum(x.numel() * x.element_size() for x in optree.tree_leaves(tree))


SMALL = [(MLP, options) for options in STRUCTURES.values()] + [(SHIFT, STRUCTURES["auto"])]
SMALL += [(STRIDE, STRUCTURES["mixed"]), (GROUPS, STRUCTURES["low rank"]), (GROUPS, STRUCTURES["corrected"])]


@pytest.mark.parametrize("case, options", SMALL)
def test_bytes_are_those_of_the_state(case, options):
    """Of each layer and in all, at the start and after a step; the dtype is that of the parameters."""
    for dtype in (torch.float64, torch.bfloat16):
        case = cast(case, dtype)
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


def counted(f):
    own = {operation: by_shapes(formula) for operation, formula in costs._formulas().items()}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        f()
    return counter.get_total_flops()


def by_shapes(formula):
    """A formula as torch's counter wants it: of shapes in place of tensors."""
    return lambda shape, *args, **options: formula(torch.empty(shape, device="meta"), *args)


LINEAR = [(MLP, STRUCTURES[name], 0) for name in ("low rank", "auto", "by name", "mixed", "corrected")]
# torch counts the backward pass of a grouped convolution once for each group.
OTHERS = [(STRIDE, {"rank": 2}, 0.1), (GROUPS, {"rank": 1}, 0.5), (MLP, STRUCTURES["unit"], 0.1)]


@pytest.mark.parametrize("case, options, tolerance", LINEAR + OTHERS)
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
    layers = lrkfac.find_layers(lambda p, x: F.linear(x, p["w"], p.get("b")), params, torch.ones(2, d_in))
    a, b = d_in + joint, d_out
    (cost,) = explain(layers, kronecker(dense(), dense())).layers.values()
    assert abs(cost.refresh - a**3 - b**3) <= 4
    assert cost.refresh_per_row == 2 * a * a + 2 * b * b and cost.apply == 2 * b * b * a + 2 * b * a * a


WIDE = {"w": torch.ones(50, 40), "v": torch.ones(30, 50), "u": torch.ones(3, 30), "s": torch.ones(50)}
WIDE_LAYERS = lrkfac.find_layers(lambda p, x: (p["s"] * (x @ p["w"].T)) @ p["v"].T @ p["u"].T, WIDE, torch.ones(2, 40))


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


def test_auto_takes_no_more_than_the_averages_of_adam():
    assert explain(WIDE_LAYERS, budget=30_000).ranks == ranks.ranks_within(WIDE_LAYERS, None, 30_000, torch.float32)
    numbers = sum(x.numel() for x in WIDE.values())
    found = ranks.resolved(WIDE_LAYERS, None, "auto")
    assert found == ranks.ranks_within(WIDE_LAYERS, None, 4 * ranks.COPIES * numbers, torch.float32)
    wide = lrkfac.find_layers(lambda p, x: x @ p, torch.ones(900, 800), torch.ones(2, 900))
    assert set(ranks.resolved(wide, None, "auto").values()) == {ranks.LARGEST}
    tiny = lrkfac.find_layers(lambda p, x: x @ p, torch.ones(40, 1), torch.ones(2, 40))
    assert set(ranks.resolved(tiny, None, "auto").values()) == {1}


def test_auto_where_nothing_takes_a_rank():
    params = {"scale": torch.ones(4), "shift": torch.zeros(4)}
    model = lambda p, x: x * p["scale"] + p["shift"]  # noqa: E731
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    layers = lrkfac.find_layers(model, params, x)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, x, y)
    for make in (precondition_by_fisher, lambda layers, **rank: lrkfac.low_rank_kfac(layers, 0.1, **rank)):
        plain, auto = (make(layers, **rank) for rank in ({}, {"rank": "auto"}))
        updates = [tx.update(e.grads, tx.init(params), params, evaluation=e)[0] for tx in (plain, auto)]
        assert all(torch.equal(updates[0][k], updates[1][k]) for k in params)
    assert explain(layers, rank="auto").ranks == {}


@pytest.mark.parametrize("make", [lrkfac.precondition_by_fisher, lrkfac.adaptive_low_rank_kfac])
@pytest.mark.parametrize("rank", ["auto", {"0": 1, "*": 2}, {"2": 1}])
def test_ranks_reach_the_state(make, rank):
    """Those that ``explain`` tells, and ``kronecker`` of each by hand."""
    layers, _ = layers_and_evaluate(MLP)
    told = explain(layers, rank=rank).ranks
    by_hand = lambda layer: kronecker(low_rank(told[layer.name]), low_rank_plus_diagonal(told[layer.name]))  # noqa: E731
    found, expected = make(layers, rank=rank).init(MLP.params), precondition_by_fisher(layers, by_hand).init(MLP.params)
    factors = found.factors if make is precondition_by_fisher else found[0].preconditioner.factors
    assert optree.tree_all(optree.tree_map(torch.equal, factors, expected.factors))


def test_print_shows_each_layer_and_the_sum():
    lines = str(explain(WIDE_LAYERS, rank=4)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [layer.name for layer in WIDE_LAYERS] + ["all"]
    assert "A rank 4, B rank 4 + diagonal" in lines[2] and "dense per unit" in str(lines)


REFUSED = {
    "budget: expected rank or budget, got both": {"rank": 2, "budget": 10**6},
    "rank: the pattern 's' matches none of the layers": {"rank": {"s": 2}},
    "rank: the pattern 'v' decides for no layer": {"rank": {"*": 2, "v": 3}},
    "rank: the structure decides": {"rank": "auto", "structure": kronecker(dense(), dense())},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words):
    with pytest.raises(ValueError, match=words):
        explain(WIDE_LAYERS, **REFUSED[words])
