"""The curvature in a state as one operator on trees: what the transformation inverts and applies."""

from functools import cache

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac.curvature import from_state
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal, unit_wise
from tests import cases, reference_networks
from tests.compiling import traced
from tests.core.curvature.test_custom_structure import Halves, TwoBlocks
from tests.tensors import close
from tests.transforms.test_precondition import layers_and_evaluate

MLP, ONE, SHIFT, GROUPS = cases.LINEAR[0], cases.LINEAR[5], cases.LINEAR[6], cases.CONVOLUTION[3]
RANKS = low_rank(2), low_rank_plus_diagonal(1)
STRUCTURES = {
    "dense": kronecker(dense(), dense()),
    "low rank": kronecker(*RANKS),
    "diagonal": kronecker(diagonal(), dense()),
    "corrected": kronecker(*RANKS, corrected=True),
    "exactly damped": kronecker(*RANKS, exact_damping=True),
    "layer": layer_wise(),
    "unit": unit_wise(),
    "squares": diagonal(),
    "full": full(),
}
each_case = pytest.mark.parametrize("case", [MLP, ONE, SHIFT, GROUPS], ids=lambda case: case.name)
PAIRS = [(MLP, name) for name in STRUCTURES] + [(GROUPS, name) for name in ("low rank", "corrected", "layer", "unit")]
PAIRS += [(ONE, "unit"), (ONE, "layer"), (SHIFT, "full")]


BY_NAME = {case.name: case for case in cases.ALL}


def evaluations(case):
    """The layers of a case, and the evaluations at two points."""
    return _evaluations(case.name)


@cache
def _evaluations(name):
    case = BY_NAME[name]
    layers, evaluate = layers_and_evaluate(case)
    return layers, [evaluate(case.params), evaluate({name: 1.1 * x for name, x in case.params.items()})]


def last_step(tx, case, steps=2):
    """The last update and the state after some steps, all at given parameters."""
    state, updates = tx.init(case.params), None
    for e in evaluations(case)[1][:steps]:
        updates, state = tx.update(e.grads, state, case.params, evaluation=e)
    return updates, state


@cache
def ranked_state():
    return last_step(lrkfac.precondition_by_fisher(evaluations(MLP)[0], rank=2), MLP)[1]


@pytest.mark.parametrize("case, name", PAIRS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_its_inverse_is_what_the_transformation_applies(case, name):
    layers, (*_, e) = evaluations(case)
    updates, state = last_step(lrkfac.precondition_by_fisher(layers, STRUCTURES[name], damping=0.1), case)
    operator = from_state((state, ()), layers)
    found = operator.inverse(0.1, exact=name in ("corrected", "exactly damped")).product(e.grads)
    assert operator.uncovered == tuple(p.path for p, _ in layers.uncovered)
    for path in operator.uncovered:
        assert not found.pop(path).any()
    close(found, {path: updates[path] for path in found}, rtol=1e-7, atol=1e-10)


@each_case
def test_with_dense_factors_it_is_the_reference(case):
    layers, _ = evaluations(case)
    _, state = last_step(lrkfac.precondition_by_fisher(layers, STRUCTURES["dense"]), case, 1)
    operator, expected = from_state(state, layers), {name: torch.zeros_like(x) for name, x in case.params.items()}
    tree = {name: torch.randn_like(x) for name, x in case.params.items()}
    for name, (A, B) in reference_networks.factors(case, "exact").items():
        G = reference_networks.gradient_matrix(case, name, tree)
        expected.update(reference_networks.layer_gradients(case, name, B @ G @ A))
    close(operator.product(tree), expected, rtol=1e-9)
    dense_matrix = operator.to_dense()
    close(operator.trace(), dense_matrix.trace())
    flat = reference_networks.flatten(tree)
    leaves = optree.tree_leaves(tree)
    row = torch.cat([x.reshape(-1) for x in leaves])
    assert len(flat) == len(row) == len(dense_matrix)
    close(operator.quadratic_form(tree), row @ dense_matrix @ row)


@pytest.mark.parametrize("make", [
    lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=2),
    lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=2),
    lambda layers: lrkfac.orthogonalize_by_fisher(layers, rank=2),
    lambda layers: lrkfac.spectral_kfac(layers, rank=2),
])  # fmt: skip
def test_it_is_found_within_chains(make):
    layers, _ = evaluations(MLP)
    operator = from_state(last_step(make(layers), MLP)[1], layers)
    assert sorted(operator.blocks) == ["0", "2", "4"] and operator.dimension == sum(
        x.numel() for x in MLP.params.values()
    )
    assert (torch.linalg.eigvalsh(operator.to_dense()) > -1e-9).all()


def test_it_is_a_tree_of_tensors_that_vmap_takes_and_returns():
    layers, state = evaluations(MLP)[0], ranked_state()
    states = optree.tree_map(lambda x: torch.stack([x, x]), state)
    operators = vmap(lambda state: from_state(state, layers))(states)
    trees = optree.tree_map(lambda x: torch.stack([x, 2 * x]), MLP.params)
    found = vmap(lambda operator, tree: operator.product(tree))(operators, trees)
    one = from_state(state, layers)
    close(optree.tree_map(lambda x: x[1], found), optree.tree_map(lambda x: 2 * x, one.product(MLP.params)))
    assert optree.tree_map(torch.clone, one).layers is layers


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True], ids=["one", "vmap"])
@pytest.mark.parametrize("name", ["low rank", "corrected", "full"])
def test_its_uses_compile_as_one_graph(name, mapped):
    """From the state to a product, an inverse, a draw and a determinant; also of an ensemble of states."""
    torch.compiler.reset()
    layers, (*_, e) = evaluations(MLP)
    _, state = last_step(lrkfac.precondition_by_fisher(layers, STRUCTURES[name], damping=0.1), MLP)

    def uses(state, tree):
        operator = from_state(state, layers)
        damped = operator.damped(0.1, exact=name != "full")
        product, inverse = operator.matvec(tree), operator.inverse(0.2).product(tree)
        return product, inverse, damped.sample(tree), damped.solve(tree), damped.logdet(), operator.trace()

    expected = uses(state, e.grads)
    if not mapped:
        close(traced(uses)(state, e.grads), expected, rtol=1e-9, atol=1e-12)
        return
    states, trees = optree.tree_map(lambda x: torch.stack([x, x]), (state, e.grads))
    found = traced(vmap(uses))(states, trees)
    for i in range(2):
        close(optree.tree_map(lambda x, i=i: x[i], found), expected, rtol=1e-9, atol=1e-12)


def test_blocks_of_some_layers():
    operator = from_state(ranked_state(), evaluations(MLP)[0])
    last = operator.of_layers(["4"])
    assert last.dimension == 15 and last.uncovered == ("0.bias", "0.weight", "2.bias", "2.weight")
    whole, part = operator.product(MLP.params), last.product(MLP.params)
    assert torch.equal(whole["4.weight"], part["4.weight"]) and not part["0.weight"].any()


def test_half_precision_leaves_stay_so():
    operator = from_state(ranked_state(), evaluations(MLP)[0])
    tree = {name: x.bfloat16() for name, x in MLP.params.items()}
    assert {x.dtype for x in operator.product(tree).values()} == {torch.bfloat16}


@cache
def refusals():
    layers, state = evaluations(MLP)[0], ranked_state()
    tx = lrkfac.precondition_by_fisher(layers, rank=2)
    stacked = optree.tree_map(lambda x: torch.stack([x, x]), state)
    others = evaluations(ONE)[0]
    custom = lrkfac.precondition_by_fisher(layers, kronecker(TwoBlocks(), TwoBlocks()))
    return {
        "state: expected the state of precondition_by_fisher": (
            lambda: from_state(lrkfac.trace(0.9).init(MLP.params), layers)
        ),
        "two preconditioners": lambda: from_state((state, state), layers),
        "expected one of the layers": lambda: from_state(state, others),
        "after some statistics": lambda: from_state(tx.init(MLP.params), layers),
        "ensemble|dimension": lambda: from_state(stacked, layers),
        "layers: expected": lambda: from_state(state, [*layers]),
        "expected some of the layers": lambda: from_state(state, layers).of_layers(["x"]),
        "tree: ": lambda: from_state(state, layers).product({}),
        "no method operator": lambda: from_state(last_step(custom, MLP)[1], layers),
    }


@pytest.mark.parametrize("message", refusals())
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        refusals()[message]()


def test_a_custom_factor_with_its_operator(monkeypatch):
    monkeypatch.setattr(Halves, "operator", lambda self: lrkfac.linalg.Dense(self.matrix), raising=False)
    layers, _ = evaluations(MLP)
    _, state = last_step(lrkfac.precondition_by_fisher(layers, kronecker(TwoBlocks(), TwoBlocks())), MLP)
    assert from_state(state, layers).dimension == sum(x.numel() for x in MLP.params.values())
