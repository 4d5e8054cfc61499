"""Real parameters on complex activations; blocks and factors are in ``tests/test_every_combination.py``."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

import lrkfac
from lrkfac.structures import dense, kronecker
from lrkfac.testing import check_layer_kind
from tests import reference_kinds as reference
from tests.compiling import traced
from tests.complex_operations import OPERATIONS, C, correlated, filtered, mixed, normal, spectral
from tests.tensors import close
from tests.test_every_combination import DAMPING, evaluated, flat, natural_gradient, places_of

TARGETS = torch.tensor([2, 0, 1, 1])


def model_of(name):
    """The inputs and the network."""
    return OPERATIONS[name].inputs, partial(reference.network, OPERATIONS[name])


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_autograd_and_micro_batches_are_the_batch(name):
    (x, model), (layers, params, whole, _) = model_of(name), evaluated(name, "exact")
    expected = grad(lambda p: F.cross_entropy(model(p, x), TARGETS))(params)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact", thin=True)
    for statistics in (True, False):
        close(lrkfac.materialize(evaluate(params, x, TARGETS, statistics=statistics).grads), expected)
    assert OPERATIONS[name].kind in {layer.kind for layer in layers}
    parts = zip(x.split(2), TARGETS.split(2), strict=True)
    merged = lrkfac.merge_evaluations([evaluate(params, *part) for part in parts])
    for other in (merged, evaluate(params, x, TARGETS, examples=torch.arange(4))):
        close(other.statistics.inputs, whole.statistics.inputs)
        close(other.statistics.output_gradients, whole.statistics.output_gradients)


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.matrices])
def test_a_structure_corrected_by_moments_has_those_of_the_examples(name):
    """Second moments of the examples' gradients along the eigenvectors of both factors (George et al. 2018)."""
    operation = OPERATIONS[name]
    _, params, evaluation, cotangent = evaluated(name, "exact")
    places, gradient = places_of(params), flat(evaluation.grads, params)
    fisher = reference.fisher_matrix(operation, params, cotangent)
    found = natural_gradient(name, "exact", kronecker(dense(), dense(), corrected=True))
    for matrix in operation.matrices:
        A, B = (x[0] for x in reference.factors(operation, params, cotangent, matrix))
        assert all(len(x) == 1 or torch.linalg.eigvalsh(x).diff().min() > 1e-6 for x in (A, B))
        at = matrix(places)[0]
        basis = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
        block = fisher[at.flatten()[:, None], at.flatten()]
        values = (basis.mT @ block @ basis).diagonal()
        natural = basis @ ((basis.mT @ gradient[at].flatten()) / (values + DAMPING))
        close(found[at.flatten()], natural)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_a_whole_chain_in_single_precision(dtype):
    """Complex numbers of one precision beside parameters of another; products with the Fisher matrix agree."""
    name = "gain of channels"
    (x, model), (layers, params, in_double, cotangent) = model_of(name), evaluated(name, "exact")
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    evaluation = evaluate(params, x.to(dtype.to_complex()), TARGETS)
    torch.testing.assert_close(evaluation.grads, in_double.grads, rtol=1e-4, atol=1e-5)
    fisher = reference.fisher_matrix(OPERATIONS[name], params, cotangent)
    product = flat(evaluation.product(evaluation.grads), params)
    torch.testing.assert_close(product, fisher @ flat(evaluation.grads, params), rtol=1e-4, atol=1e-5)
    for tx in (lrkfac.low_rank_kfac(layers, 0.1), lrkfac.adaptive_low_rank_kfac(layers), lrkfac.kfac(layers, 0.1)):
        updates, _ = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        moved = lrkfac.apply_updates(params, updates)
        assert evaluation.loss_at(moved) < evaluation.loss
        assert all(x.dtype == torch.float64 and x.isfinite().all() for x in moved.values())


def test_custom_kinds_of_complex_numbers_pass_their_checks():
    check_layer_kind(mixed, C(4, 2, 3), normal(2, 3), normal(2))
    check_layer_kind(filtered, normal(4, 5), normal(3))
    check_layer_kind(spectral, normal(4, 5), normal(2, 3))
    check_layer_kind(correlated, C(4, 3, 3), normal(2, 3, 2))


def test_complex_parameters_and_outputs_are_refused_by_name():
    params = {"real": torch.ones(3), "gains": torch.ones(3, dtype=torch.complex64)}
    model = lambda p, x: (torch.fft.rfft(x) * p["gains"]).abs() * p["real"]  # noqa: E731
    with pytest.raises(TypeError, match=r"params: .* got torch.complex64 at 'gains'; .* torch.view_as_complex"):
        lrkfac.find_layers(model, params, torch.ones(2, 5))
    for tx in (lrkfac.trace(0.9), lrkfac.scale_by_adam(), lrkfac.ema_params()):
        with pytest.raises(TypeError, match=r"params: .* got torch.complex64 at 'gains'"):
            tx.init(params)
    params, model = {"s": torch.ones(3)}, lambda p, x: torch.fft.rfft(x) * p["s"]
    layers = lrkfac.find_layers(model, params, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"model: .* got torch.complex64 of shape \(2, 3\); .* torch.view_as_real"):
        lrkfac.evaluator(model, lrkfac.gaussian(), layers)(params, torch.ones(2, 5), torch.ones(2, 3))


def test_a_complex_parameter_held_as_a_real_one_has_the_gradient_of_autograd():
    params, x, y = {"gains": normal(3, 2), "head": normal(2, 3)}, normal(4, 5), torch.tensor([0, 1, 1, 0])

    def model(p, x):
        return (torch.fft.rfft(x) * torch.view_as_complex(p["gains"])).abs() @ p["head"].T

    layers = lrkfac.find_layers(model, params, x)
    assert [p.path for p, _ in layers.uncovered] == ["gains"]
    found = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, x, y).grads
    close(found, grad(lambda p: F.cross_entropy(model(p, x), y))(params))


@pytest.mark.parametrize("name", ["gain of conjugates", "mix"])
@pytest.mark.parametrize(
    "transform",
    [pytest.param(traced, marks=pytest.mark.slow), lambda f: lambda p: vmap(f)({k: x[None] for k, x in p.items()})],
)
def test_steps_in_one_graph_or_mapped_over_are_the_same(name, transform):
    (x, model), (layers, params, _, _) = model_of(name), evaluated(name, "exact")
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    tx = lrkfac.precondition_by_fisher(layers, damping=DAMPING)

    def step(params):
        evaluation = evaluate(params, x, TARGETS)
        return tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[0]

    found, expected = transform(step)(params), step(params)
    close({name: x.reshape(expected[name].shape) for name, x in found.items()}, expected)
