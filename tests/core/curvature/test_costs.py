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
CASES = pytest.mark.parametrize("case", [MLP, SHIFT, STRIDE, GROUPS], ids=lambda case: case.name)
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
each_structure = pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES.keys())


def size(tree):
    return sum(x.numel() * x.element_size() for x in optree.tree_leaves(tree))


@CASES
@each_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_those_of_the_state(case, options, dtype):
    """Of each layer and in all, at the start and after a step."""
    case = cast(case, dtype)
    layers, evaluate = layers_and_evaluate(case)
    tx, found = precondition_by_fisher(layers, **options), explain(layers, dtype=dtype, **options)
    start, e = tx.init(case.params), evaluate(case.params)
    for state in (start, tx.update(e.grads, start, case.params, evaluation=e)[1]):
        assert found.total.bytes == size(state)
        of_layers = {name: size(block) for name, block in state.blocks.items()}
        assert {name: cost.bytes for name, cost in found.layers.items()} == of_layers


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_parameters(case, dtype):
    case = cast(case, dtype)
    layers = lrkfac.find_layers(case.model, case.params, case.inputs)
    assert {p.dtype for p in layers.parameters} == {dtype}
    assert explain(layers, rank=2).total.bytes == size(precondition_by_fisher(layers, rank=2).init(case.params))
    budget = explain(layers, rank=2).total.bytes
    assert explain(layers, budget=budget).total.bytes <= budget


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
OTHERS = [
    (STRIDE, {"rank": 2}, 0.1),
    (GROUPS, {"rank": 1}, 0.5),
    (MLP, {"structure": lrkfac.structures.unit_wise()}, 0.1),
]


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


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(1, 5))
def test_operations_by_hand(d_in, d_out, joint, r):
    """Dense factors: Cholesky and inverse, ``rowsᵀ rows``, two products. Low rank: all by ``r``."""
    params = {"w": torch.ones(d_out, d_in), **({"b": torch.ones(d_out)} if joint else {})}
    layers = lrkfac.find_layers(lambda p, x: F.linear(x, p["w"], p.get("b")), params, torch.ones(2, d_in))
    a, b = d_in + joint, d_out
    (cost,) = explain(layers, kronecker(dense(), dense())).layers.values()
    assert abs(cost.refresh - a**3 - b**3) <= 4
    assert cost.refresh_per_row == 2 * a * a + 2 * b * b
    assert cost.apply == 2 * b * b * a + 2 * b * a * a
    if min(a, b) > r + 2:
        (cost,) = explain(layers, rank=r).layers.values()
        assert cost.apply == 8 * r * b * d_in + 4 * r * r * b + joint * 6 * r * b
        assert cost.refresh_per_row <= 8 * (r + 4) * (a + b) + 4 * a
        assert cost.bytes <= 4 * ((2 * r + 1) * (a + b) + a + 2 * b + 4 * r + 3) + 16


WIDE = {"w": torch.ones(50, 40), "v": torch.ones(30, 50), "u": torch.ones(3, 30), "s": torch.ones(50)}
WIDE_LAYERS = lrkfac.find_layers(lambda p, x: (p["s"] * (x @ p["w"].T)) @ p["v"].T @ p["u"].T, WIDE, torch.ones(2, 40))


def of(rank):
    return ranks._bytes(WIDE_LAYERS, None, rank, torch.float32, {})


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
    found = []
    for tx in (precondition_by_fisher(layers), precondition_by_fisher(layers, rank="auto")):
        found.append(tx.update(e.grads, tx.init(params), params, evaluation=e)[0])
    assert all(torch.equal(found[0][k], found[1][k]) for k in params)
    for make in (lrkfac.low_rank_kfac(layers, 0.1, rank="auto"), lrkfac.adaptive_low_rank_kfac(layers, rank="auto")):
        make.update(e.grads, make.init(params), params, evaluation=e)
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
    assert "(all layers)" in str(explain(WIDE_LAYERS, lrkfac.structures.full()))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"rank": 2, "budget": 10**6}, ValueError, "budget: expected rank or budget, got both"),
        ({"budget": True}, TypeError, "budget: expected an integer"),
        ({"rank": {"v": 0}}, ValueError, "rank: expected an integer >= 1 for 'v', got 0"),
        ({"rank": {"z": 2}}, ValueError, "rank: the pattern 'z' matches none of the layers"),
        ({"rank": {"s": 2}}, ValueError, "rank: the pattern 's' matches none of the layers"),
        ({"rank": {"*": 2, "v": 3}}, ValueError, "rank: the pattern 'v' decides for no layer"),
        ({"rank": "auto", "structure": kronecker(dense(), dense())}, ValueError, "rank: the structure decides"),
        ({"budget": 10**6, "structure": lrkfac.structures.full()}, ValueError, "rank: the structure decides"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        explain(WIDE_LAYERS, **options)
