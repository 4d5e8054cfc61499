"""``kronecker(..., exact_damping=True)``: what the state holds, damped as a whole, is what is applied."""

import itertools

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import lrkfac
from lrkfac import diagnose, precondition_by_fisher
from lrkfac.core.curvature import precondition
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from tests import cases, reference, reference_networks
from tests.core.curvature.test_custom_structure import TwoBlocks
from tests.core.curvature.test_refresh import deep, drawing, problem
from tests.dispatch import LargestTensor
from tests.tensors import close
from tests.transforms.test_precondition import GROUPS, MLP, SHIFT, STRIDE, layers_and_evaluate, trained

SIDES = {
    "low rank": low_rank(2),
    "weighted": low_rank(1, weight=2.0),
    "without residual": low_rank(1, residual="none"),
    "diagonal too": low_rank_plus_diagonal(1),
    "dense": dense(),
    "diagonal": diagonal(),
    "custom": TwoBlocks(),
}
PAIRS = [pair for pair in itertools.product(SIDES, SIDES) if pair != ("diagonal too", "diagonal too")]


NAMED = [f"{input} x {output}" for input, output in PAIRS]


def structure_of(input, output, **options):
    return kronecker(SIDES[input], SIDES[output], exact_damping=True, **options)


@pytest.mark.parametrize("case", [MLP, SHIFT, STRIDE, GROUPS], ids=lambda case: case.name)
@pytest.mark.parametrize("input, output", PAIRS, ids=NAMED)
def test_is_the_inverse_of_the_whole(case, input, output):
    """With joint biases, uncovered parameters, convolutions and groups; of the average after two batches."""
    layers, evaluate = layers_and_evaluate(case)
    structure = structure_of(input, output)
    tx = precondition_by_fisher(layers, structure, damping=0.03, decay=0.8)
    *_, (e, updates, state, _) = trained(tx, case.params, evaluate, 2, every=1)
    expected = dict(e.grads)
    for layer in layers:
        operator = structure.fitted(layer.d_in, layer.d_out).operator
        held = state.factors[layer.name]
        factors = held if layer.groups > 1 else optree.tree_map(lambda x: x[None], held)
        B, A = vmap(lambda x, operator=operator: tuple([one.to_dense() for one in operator(x)]))(factors)
        G = reference_networks.gradient_matrix(case, layer.name, e.grads)
        natural = reference.exactly_damped_preconditioned(G, A, B, 0.03)
        expected.update(reference_networks.layer_gradients(case, layer.name, natural))
        close(state.dampings[layer.name], torch.full((layer.groups,), 0.03).double().squeeze(), 1e-6)
    close(updates, expected, rtol=1e-7, atol=1e-10)


ROWS = [("low rank", "diagonal too"), ("diagonal too", "low rank"), ("low rank", "low rank"), ("dense", "diagonal too")]
each_of_rows = pytest.mark.parametrize("input, output", ROWS, ids=[f"{input} x {output}" for input, output in ROWS])


@pytest.mark.parametrize("bias", ["joint", "separate"])
@each_of_rows
def test_gradients_by_rows_are_not_formed(input, output, bias):
    """They and the natural ones stay products of few rows; to rounding the same as of formed ones."""
    n, d = 3, 40
    draw = drawing(0)
    params = {"w": draw(d, d) / 4, "b": draw(d), "v": draw(4, d)}
    model = lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"])  # noqa: E731
    results = []
    for thin in (True, False):
        layers, _, evaluate = problem(model, params, drawing(1), (n, d), bias=bias, thin=thin)
        tx, e = precondition_by_fisher(layers, structure_of(input, output), damping=0.1), evaluate(params)
        _, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
        plain = evaluate(params, statistics=False)
        with LargestTensor() as largest:
            updates, _ = tx.update(plain.grads, state, params, evaluation=plain)
        if thin:
            assert isinstance(updates["w"], lrkfac.LazyMatrix) and updates["w"].left.shape[0] <= n + 1 + 2 * 2 + d
            assert input == "dense" or largest.numel < d * d
        results.append(lrkfac.materialize(updates))
    close(*results, rtol=1e-9, atol=1e-11)


@each_of_rows
def test_equal_layers_are_applied_in_one_call(monkeypatch, input, output):
    layers, params, evaluate = deep(4)
    tx, e = precondition_by_fisher(layers, structure_of(input, output), damping=0.1), evaluate(params)
    together, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
    monkeypatch.setitem(precondition.LARGEST, "cpu", 0)
    apart, _ = tx.update(e.grads, state, params, evaluation=evaluate(params, statistics=False))
    close(together, apart)


def test_embeddings():
    """Their one-hot side is diagonal; beside low rank plus diagonal, that is decomposed as a dense matrix."""
    draw, tokens = drawing(2), torch.tensor([0, 3, 3, 1, 5])
    params = {"e": draw(6, 4), "w": draw(3, 4)}
    model = lambda p, x: F.linear(F.embedding(x, p["e"]), p["w"])  # noqa: E731
    layers = lrkfac.find_layers(model, params, tokens)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")
    e = evaluate(params, tokens, torch.tensor([0, 1, 2, 0, 1]))
    for pair in (("low rank", "diagonal too"), ("diagonal too", "low rank")):
        tx = precondition_by_fisher(layers, structure_of(*pair), damping=0.1)
        updates, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
        structure = structure_of(*pair).for_layer(layers["e"])
        B, A = (side.to_dense() for side in structure.operator(state.factors["e"]))
        matrix = e.grads["e"] if layers["e"].d_out == 6 else e.grads["e"].mT
        expected = reference.exactly_damped_preconditioned(matrix[None], A[None], B[None], 0.1)[0]
        close(updates["e"], expected if layers["e"].d_out == 6 else expected.mT, rtol=1e-9)


@pytest.mark.parametrize("case", [MLP, GROUPS], ids=lambda case: case.name)
@each_of_rows
def test_numbers_of_the_whole(case, input, output):
    """Effective dimension and spectrum of the average; the condition is a bound where a diagonal is in it."""
    layers, evaluate = layers_and_evaluate(case)
    structure = structure_of(input, output)
    tx = precondition_by_fisher(layers, structure, damping=0.05)
    *_, (_, _, state, _) = trained(tx, case.params, evaluate, every=1)
    for layer in layers:
        diagnosis = diagnose(state, layers).layers[layer.name]
        held, inverse = state.factors[layer.name], state.inverses[layer.name]
        lead = (lambda tree: tree) if layer.groups > 1 else (lambda tree: optree.tree_map(lambda x: x[None], tree))
        operator = structure.fitted(layer.d_in, layer.d_out).operator
        average = vmap(lambda x, operator=operator: operator(x).to_dense())(lead(held))
        values = torch.linalg.eigvalsh(average)
        close(diagnosis.numbers["F"]["effective_dimension"], (values / (values + 0.05)).sum(), rtol=1e-6, atol=1e-8)
        close(diagnosis.eigenvalues["F"].sum() + diagnosis.rest["F"], values.sum(), rtol=1e-9)
        dense_inverse = torch.linalg.eigvalsh(vmap(lambda x: x.to_dense())(lead(inverse)))
        condition = dense_inverse.amax() / dense_inverse.amin()
        assert condition * (1 - 1e-9) <= diagnosis.numbers["F"]["condition"] <= 4 * condition
        assert "damping" not in diagnosis.numbers["A"] and diagnosis.numbers["A"]["rank"] > 0


def test_nearer_to_the_exact_inverse_than_split_damping():
    """``gᵀ (F + λ I)⁻¹ h`` of examples' gradients, with the exact Gauss–Newton matrix of each layer: correlations."""
    case = cases.LINEAR[0]
    layers, evaluate = layers_and_evaluate(case)
    e, generator = evaluate(case.params), torch.Generator().manual_seed(0)
    found = {"exact": [], "split": [], "truth": []}
    for layer in layers:
        (F_block,) = reference_networks.gauss_newton_blocks(case, layer.name)
        damping = 0.03 * float(F_block.trace()) / len(F_block)
        g = torch.randn(40, layer.d_out * layer.d_in, generator=generator, dtype=torch.float64)
        truth = torch.linalg.solve(F_block + damping * torch.eye(len(F_block)).double(), g.mT).mT
        for name in ("exact", "split"):
            structure = kronecker(dense(), dense(), exact_damping=name == "exact")
            tx = precondition_by_fisher(layers, structure, damping=damping)
            _, state = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
            found[name].append(to_dense(state.inverses[layer.name]) @ g.mT)
        found["truth"].append(truth.mT)
    flat = {name: torch.cat([(x / t.norm()).reshape(-1) for x, t in zip(parts, found["truth"], strict=True)])
            for name, parts in found.items()}  # fmt: skip
    correlation = {name: float(torch.corrcoef(torch.stack([x, flat["truth"]]))[0, 1]) for name, x in flat.items()}
    assert correlation["exact"] > correlation["split"]


def test_refused():
    with pytest.raises(ValueError, match="exact_damping: expected eigenvectors of one side"):
        kronecker(low_rank_plus_diagonal(2), low_rank_plus_diagonal(2), exact_damping=True)
    with pytest.raises(ValueError, match="exact_damping: corrected=True is damped exactly as it is"):
        kronecker(dense(), dense(), corrected=True, exact_damping=True)
    with pytest.raises(TypeError, match="exact_damping: expected True or False"):
        kronecker(dense(), dense(), exact_damping=1)
    assert kronecker(dense(), dense(), exact_damping=True).description() == "A dense, B dense, exactly damped"
