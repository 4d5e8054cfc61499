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
from tests.described import layers_of
from tests.dispatch import LargestTensor

DAMPING, DECAY = 0.03, 0.6
STRUCTURES = {"full": full(), "layer_wise": layer_wise(), "unit_wise": unit_wise(), "diagonal": diagonal()}
# BatchNorm mixes examples, so that there is no gradient of one example.
NAMES = [name for name in test_models.MODELS if name != "residual"]


def as_case(name):
    """A model of ``test_models`` with its parameters in a flat dictionary."""
    model, params, inputs, targets, _ = test_models.make(name)
    leaves, structure = optree.tree_flatten(params)
    flat = {str(i): leaf for i, leaf in enumerate(leaves)}

    def of_flat(flat, inputs):
        return model(optree.tree_unflatten(structure, [flat[str(i)] for i in range(len(leaves))]), inputs)

    return cases.Case(name, of_flat, flat, inputs, targets, "categorical", {}, ())


def layers_and_evaluate(case):
    layers = layers_of(case)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    evaluate = lrkfac.evaluator(case.model, likelihood, layers, "exact")
    return layers, lambda params, inputs=case.inputs: evaluate(params, inputs, case.targets)


def solved(gradients, matrix, blocks):
    """``(block + λ I)⁻¹ g`` for each row of places in ``blocks``; the other gradients as they are."""
    natural = reference_networks.flatten(gradients)
    for places in blocks:
        block = matrix[places[:, None], places]
        shifted = block + DAMPING * torch.eye(len(places), dtype=block.dtype)
        natural[places] = torch.linalg.solve(shifted, natural[places])
    return natural


def blocks_of(case, layers):
    """Rows of places in ``flatten(params)`` that make a block each, for every structure."""
    sizes = [leaf.numel() for leaf in case.params.values()]
    places = torch.arange(sum(sizes))
    place = {k: part.reshape(p.shape) for (k, p), part in zip(case.params.items(), places.split(sizes), strict=True)}
    if case.stages:  # by the references alone
        matrices = [reference_networks.gradient_matrix(case, name, place) for name in case.layers]
    else:
        leaves = [place[parameter.path] for parameter in layers.parameters]
        joined = ((layer_matrix(layer, leaves).joined(), layer) for layer in layers)
        matrices = [matrix.reshape(layer.groups, layer.d_out, layer.d_in) for matrix, layer in joined]
        assert torch.equal(torch.cat([m.flatten() for m in matrices]).sort().values, places)
    units = [row for matrix in matrices for row in matrix.flatten(0, 1)]
    return {
        "full": [torch.cat([matrix.flatten() for matrix in matrices])],
        "layer_wise": [row for matrix in matrices for row in matrix.flatten(1)],
        "unit_wise": units,
        "diagonal": torch.cat(units)[:, None],
    }


def check_structures(case):
    """Over two batches, which with decay ``ρ`` weigh ``ρ / (1 + ρ)`` and ``1 / (1 + ρ)``."""
    layers, evaluate = layers_and_evaluate(case)
    second = case._replace(inputs=optree.tree_map(lambda x: x.flip(0), case.inputs))
    both = [(reference_networks.gauss_newton_matrix(c), reference_networks.gradients(c)) for c in (case, second)]
    (old, first_gradients), (new, gradients) = both
    evaluations = evaluate(case.params), evaluate(case.params, second.inputs)
    for name, blocks in blocks_of(case, layers).items():
        tx = precondition_by_fisher(layers, STRUCTURES[name], damping=DAMPING, decay=DECAY)
        state = tx.init(case.params)
        expected = (first_gradients, old), (gradients, (DECAY * old + new) / (1 + DECAY))
        for e, (grads, matrix) in zip(evaluations, expected, strict=True):
            updates, state = tx.update(e.grads, state, case.params, evaluation=e)
            natural = solved(grads, matrix, blocks)
            found = torch.cat([updates[key].flatten() for key in case.params])
            assert (found - natural).abs().max() <= 1e-8 * natural.abs().max(), name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", [*cases.ALL, *map(as_case, NAMES)], ids=lambda case: case.name)
def test_preconditioned_gradients_equal_those_of_the_explicit_matrix(case):
    check_structures(case)


def sequence_first(params, x):
    x = torch.tanh(F.linear(x.transpose(0, 1), params["a"]))
    return F.linear(x, params["b"]).mean(0)


def positions(first, params, x):
    numbers = torch.arange(x.shape[1]).reshape(first)
    return F.linear(torch.tanh(x + F.embedding(numbers, params["b"])), params["a"]).mean(1)


AXES = {"sequence": sequence_first, "numbers": partial(positions, (-1,)), "with an axis": partial(positions, (1, -1))}


@pytest.mark.parametrize("examples", [3, 4])
@pytest.mark.parametrize("name", AXES)
def test_uses_without_the_batch_in_front_are_right_or_refused(name, examples):
    params = {"a": torch.randn(5, 5).double(), "b": torch.randn(3, 5).double()}
    inputs, targets = torch.randn(examples, 3, 5).double(), torch.randint(3, (examples,))
    case = cases.Case("axes", AXES[name], params, inputs, targets, "categorical", {}, ())
    uncovered = layers_and_evaluate(case)[0].uncovered
    assert all("batch" in reason for _, reason in uncovered)
    try:
        if not uncovered:
            check_structures(case)
    except ValueError as error:
        assert "batch" in str(error)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("case", [cases.LINEAR[6], cases.CONVOLUTION[3]], ids=lambda case: case.name)
def test_laws(case, name):
    layers, evaluate = layers_and_evaluate(case)
    tx = precondition_by_fisher(layers, STRUCTURES[name], decay=0.7)
    check_transformation(tx, case.params, lambda p: ((e := evaluate(p)).grads, {"evaluation": e}))


REDUCED = kronecker(dense(), dense(), treatment="reduce")
EMBEDDED = [(False, s) for s in (None, kronecker(dense(), dense()), kronecker(low_rank(2), low_rank(2)), REDUCED)]


@pytest.mark.parametrize("tied, structure", [*EMBEDDED, (True, None)])
def test_embedding_needs_no_square_of_its_vocabulary(tied, structure):
    def model(params, tokens):
        x = torch.tanh(F.linear(F.embedding(tokens, params["table"]), params["mix"]))
        return F.linear(x, params["table"] if tied else params["head"])[:, 0]

    params = {"mix": torch.randn(4, 4), "table": torch.randn(2000, 4), "head": torch.randn(3, 4)}
    tokens, targets = torch.randint(2000, (5, 6)), torch.randint(3, (5,))
    layers = lrkfac.find_layers(model, params, tokens)
    assert layers["table"].kinds == (("embedding", "linear") if tied else ("embedding",))
    tx, evaluate = precondition_by_fisher(layers, structure), lrkfac.evaluator(model, lrkfac.categorical(), layers)
    with LargestTensor() as largest:
        e = evaluate(params, tokens, targets)
        tx.update(e.grads, tx.init(params), params, evaluation=e)
    assert 2000 * 4 <= largest.numel <= (25 if tied else 20) * 2000 * 4
