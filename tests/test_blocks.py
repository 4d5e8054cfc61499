"""``full``, ``layer_wise``, ``unit_wise`` and ``diagonal`` are blocks of the explicit matrix ``(1/M) Σ JᵀHJ``."""

from functools import partial

import optree
import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.core.layers.matrix import layer_matrix
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, unit_wise
from lrkfac.testing import check_transformation
from tests import cases, reference_networks, test_models
from tests.dispatch import LargestTensor
from tests.reference import kronecker_preconditioned

DAMPING = 0.03
STRUCTURES = {"full": full(), "layer_wise": layer_wise(), "unit_wise": unit_wise(), "diagonal": diagonal()}
# BatchNorm mixes examples, so that there is no gradient of one example.
NAMES = [name for name in test_models.MODELS if name != "residual"]
each_structure = pytest.mark.parametrize("name", STRUCTURES)
each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)


def as_case(name):
    """A model of ``test_models`` with its parameters in a flat dictionary."""
    model, params, inputs, targets, _ = test_models.make(name)
    leaves, structure = optree.tree_flatten(params)
    flat = {str(i): leaf for i, leaf in enumerate(leaves)}

    def of_flat(flat, inputs):
        return model(optree.tree_unflatten(structure, [flat[str(i)] for i in range(len(leaves))]), inputs)

    return cases.Case(name, of_flat, flat, inputs, targets, "categorical", {}, ())


def layers_and_evaluate(case, estimator="exact"):
    layers = lrkfac.find_layers(case.model, case.params, case.inputs)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    evaluate = lrkfac.evaluator(case.model, likelihood, layers, estimator)
    return layers, lambda params, inputs=case.inputs: evaluate(params, inputs, case.targets)


def one_update(case, structure):
    layers, evaluate = layers_and_evaluate(case)
    tx, e = precondition_by_fisher(layers, structure, damping=DAMPING), evaluate(case.params)
    return tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)[0]


def close(found, expected, rtol=1e-8):
    scale = max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= rtol * scale, name


def numbers(tree):
    """The place of each entry of each leaf in ``flatten(tree)``."""
    sizes = [leaf.numel() for leaf in tree.values()]
    parts = torch.arange(sum(sizes)).split(sizes)
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(tree.items(), parts, strict=True)}


def solved(case, matrix, blocks):
    """``(block + λ I)⁻¹ g`` for each row of places in ``blocks``; the other gradients as they are."""
    natural = reference_networks.flatten(reference_networks.gradients(case))
    for places in blocks:
        F = matrix[places[:, None], places]
        natural[places] = torch.linalg.solve(F + DAMPING * torch.eye(len(F), dtype=F.dtype), natural[places])
    return {name: natural[place] for name, place in numbers(case.params).items()}


def blocks_of_case(case, name):
    """Rows of places, by the references alone."""
    place = numbers(case.params)
    matrices = [reference_networks.gradient_matrix(case, layer, place) for layer in case.layers]
    if name == "full":
        return [torch.cat([matrix.flatten() for matrix in matrices])]
    start = {"layer_wise": 1, "unit_wise": 2, "diagonal": 3}[name]
    return [row for m in matrices for row in m.reshape(m.shape[:start].numel(), -1)]


@each_case
@each_structure
def test_preconditioned_gradients_equal_those_of_the_explicit_matrix(case, name):
    matrix = reference_networks.gauss_newton_matrix(case)
    close(one_update(case, STRUCTURES[name]), solved(case, matrix, blocks_of_case(case, name)))


@each_case
def test_layer_wise_equals_the_blocks_of_the_reference(case):
    found = one_update(case, layer_wise())
    grads = reference_networks.gradients(case)
    for name in case.layers:
        G = reference_networks.gradient_matrix(case, name, grads)
        F = reference_networks.gauss_newton_blocks(case, name)
        shifted = F + DAMPING * torch.eye(F.shape[-1], dtype=F.dtype)
        natural = torch.linalg.solve(shifted, G.flatten(1)).reshape(G.shape)
        close(found, reference_networks.layer_gradients(case, name, natural))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("model", NAMES)
def test_models_of_all_styles(model):
    check_structures(as_case(model))


def check_structures(case):
    layers, _ = layers_and_evaluate(case)
    matrix, place = reference_networks.gauss_newton_matrix(case), numbers(case.params)
    leaves = [place[parameter.path] for parameter in layers.parameters]
    found = [layer_matrix(layer, leaves).joined().reshape(layer.groups, layer.d_out, layer.d_in) for layer in layers]
    blocks = {
        "full": [torch.arange(len(matrix))],
        "layer_wise": [row for m in found for row in m.flatten(1)],
        "unit_wise": [row for m in found for row in m.flatten(0, 1)],
        "diagonal": torch.arange(len(matrix))[:, None],
    }
    assert torch.equal(torch.cat([m.flatten() for m in found]).sort().values, torch.arange(len(matrix)))
    for name, structure in STRUCTURES.items():
        close(one_update(case, structure), solved(case, matrix, blocks[name]))


def sequence_first(params, x):
    x = torch.tanh(F.linear(x.transpose(0, 1), params["a"]))
    return F.linear(x, params["b"]).mean(0)


def positions(first, params, x):
    numbers = torch.arange(x.shape[1]).reshape(first)
    return F.linear(torch.tanh(x + F.embedding(numbers, params["c"])), params["d"]).mean(1)


@pytest.mark.parametrize("examples", [3, 4])
@pytest.mark.parametrize(
    "model, shapes",
    [
        pytest.param(sequence_first, {"a": (4, 5), "b": (3, 4)}, id="sequence first"),
        pytest.param(partial(positions, (-1,)), {"c": (3, 5), "d": (3, 5)}, id="numbers of positions"),
        pytest.param(partial(positions, (1, -1)), {"c": (3, 5), "d": (3, 5)}, id="the same with an axis in front"),
    ],
)
def test_uses_without_the_batch_in_front_are_right_or_refused(model, shapes, examples):
    params = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    inputs, targets = torch.randn(examples, 3, 5).double(), torch.randint(3, (examples,))
    case = cases.Case("axes", model, params, inputs, targets, "categorical", {}, ())
    uncovered = layers_and_evaluate(case)[0].uncovered
    if uncovered:
        assert all("batch" in reason for _, reason in uncovered)
        return
    try:
        check_structures(case)
    except ValueError as error:
        assert "batch" in str(error)


@each_structure
@pytest.mark.parametrize("case", [cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[3]], ids=lambda case: case.name)
def test_laws(case, name):
    layers, evaluate = layers_and_evaluate(case)
    tx = precondition_by_fisher(layers, STRUCTURES[name], decay=0.7)
    check_transformation(tx, case.params, lambda p: ((e := evaluate(p)).grads, {"evaluation": e}))


@each_structure
def test_averages_over_batches(name):
    """Two batches with decay ``ρ`` weigh ``ρ / (1 + ρ)`` and ``1 / (1 + ρ)``."""
    case, decay = cases.CONVOLUTION[3], 0.6
    layers, evaluate = layers_and_evaluate(case)
    second = case._replace(inputs=torch.randn_like(case.inputs))
    tx = precondition_by_fisher(layers, STRUCTURES[name], damping=DAMPING, decay=decay)
    e = evaluate(case.params)
    _, state = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    e = evaluate(case.params, second.inputs)
    found, _ = tx.update(e.grads, state, case.params, evaluation=e)
    old, new = map(reference_networks.gauss_newton_matrix, (case, second))
    matrix = (decay * old + new) / (1 + decay)
    close(found, solved(second, matrix, blocks_of_case(case, name)))


def test_structures_may_differ_by_layer():
    case = as_case("conv1d")
    layers, _ = layers_and_evaluate(case)
    name = layers.layers[0].name
    mixed = one_update(case, {name: layer_wise(), "*": diagonal()})
    first = {p.path for p in (layers[name].weight, layers[name].bias)}
    own, other = one_update(case, layer_wise()), one_update(case, diagonal())
    close(mixed, {k: own[k] if k in first else other[k] for k in other}, rtol=0)


def test_scales_and_shifts_have_a_block_for_each_unit_by_default():
    case = as_case("conv1d")
    layers, _ = layers_and_evaluate(case)
    units = unit_wise()
    expected = one_update(case, units)
    for structure in (None, kronecker(dense(), dense())):
        found, paths = one_update(case, structure), []
        for layer in layers:
            if layer.kind in ("scale", "shift"):
                paths += [p.path for p in (layer.weight, layer.bias) if p is not None]
        assert len(paths) == 5
        close(found, {path: expected[path] for path in paths}, rtol=0)


# Embeddings -------------------------------------------------------------------------------------------


def embedded(size):
    def model(params, tokens):
        return F.linear(torch.tanh(F.embedding(tokens, params["table"])).mean(1), params["head"])

    params = {"head": torch.randn(3, 4).double(), "table": torch.randn(size, 4).double()}
    tokens, targets = torch.randint(size, (5, 6)), torch.randint(3, (5,))
    return cases.Case("embedded", model, params, tokens, targets, "categorical", {}, ())


def test_embedding_equals_the_explicit_product():
    """Its one-hot side is the diagonal of frequencies, the other side that of the gradients at its outputs."""
    case = embedded(7)
    found = one_update(case, kronecker(dense(), dense()))["table"]
    one_hot = F.one_hot(case.inputs, 7).double()

    def run(probe):
        x = F.embedding(case.inputs, case.params["table"]) + probe
        return F.linear(torch.tanh(x).mean(1), case.params["head"])

    probe = torch.zeros(5, 6, 4).double()
    jacobian = torch.func.jacrev(run)(probe)  # [n, class, n, t, d]
    p = run(probe).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    B = torch.einsum("ncati,nce,neatj->ij", jacobian, hessian, jacobian) / 5
    A = torch.diag(one_hot.mean((0, 1)))
    G = reference_networks.gradients(case)["table"]
    expected = kronecker_preconditioned(G.T[None], A[None], B[None], DAMPING)[0].T
    close({"table": found}, {"table": expected})


@pytest.mark.parametrize("structure", [None, kronecker(dense(), dense()), kronecker(low_rank(2), low_rank(2))])
def test_embedding_needs_no_square_of_its_vocabulary(structure):
    case, largest = embedded(2000), LargestTensor()
    layers, evaluate = layers_and_evaluate(case)
    assert layers["table"].kind == "embedding"
    tx = precondition_by_fisher(layers, structure)
    with largest:
        e = evaluate(case.params)
        tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    assert 2000 * 4 <= largest.numel <= 20 * 2000 * 4


def test_tied_embedding_needs_no_square_of_its_vocabulary():
    def model(params, tokens):
        x = torch.tanh(F.linear(F.embedding(tokens, params["table"]), params["mix"]))
        return F.linear(x, params["table"])

    params = {"mix": torch.randn(4, 4), "table": torch.randn(2000, 4)}
    tokens, largest = torch.randint(2000, (5, 6)), LargestTensor()
    layers = lrkfac.find_layers(model, params, tokens, strict=True)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
    tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2)
    with largest:
        e = evaluate(params, tokens, tokens)
        tx.update(e.grads, tx.init(params), params, evaluation=e)
    assert largest.numel <= 2000 * 100
