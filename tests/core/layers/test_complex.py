"""Real parameters on complex activations: gradients as by autograd, blocks as in the explicit Fisher matrix."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

import lrkfac
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
from lrkfac.testing import check_layer_kind
from tests import reference_kinds as reference
from tests.compiling import traced
from tests.reference_kinds import Operation

DAMPING = 0.03
TARGETS = torch.tensor([2, 0, 1, 1])
ESTIMATORS = ["exact", "mc", "empirical"]
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=GENERATOR, dtype=dtype)


def parts(z):
    """Real and imaginary parts along an axis after the batch: real outputs with the same derivatives."""
    return torch.view_as_real(z.resolve_conj()).movedim(-1, 1)


mixed = lrkfac.LayerKind("mix", lambda z, w, b: z @ w.mT.to(z.dtype) + b, lambda z, w: z @ w.mT.to(z.dtype))
filtered = lrkfac.LayerKind(
    "filter",
    lambda x, w: torch.fft.rfft(x) * w,
    lambda x, w: (torch.fft.rfft(x)[..., None, :] * w).mT,
    weight_axis=None,
)
spectral = lrkfac.LayerKind(
    "spectral",
    lambda x, w: torch.fft.rfft(x) @ w.mT.to(torch.complex128),
    lambda x, w: torch.fft.rfft(x) @ w.mT.to(torch.complex128),
)
correlated = lrkfac.LayerKind(
    "correlated",
    lambda z, w: F.conv1d(z, w.to(z.dtype)),
    lambda z, w: F.conv1d(z, w.reshape(len(w), -1, 2).to(z.dtype)),
    channel=-2,
)
KINDS = (mixed, filtered, spectral, correlated)
C = partial(normal, dtype=torch.complex128)


def one_matrix(p):
    return p["w"].flatten(1)[None]


def of_units(p):
    return p["w"].reshape(-1, 1)


def of_rows(p):
    return p["w"].flatten(1)


GAINS = {
    "gain": ("scale", lambda p, x: parts(torch.fft.rfft(x) * p["w"] + 1j), normal(3), normal(4, 2, 5)),
    "gain of channels": ("scale", lambda p, z: parts(p["w"] * z), normal(2, 1), C(4, 2, 3)),
    "gain of conjugates": ("scale", lambda p, z: parts(torch.mul(z.conj(), p["w"]).conj()), normal(3), C(4, 3)),
    "offset": ("shift", lambda p, z: parts(z + p["w"]), normal(2, 3), C(4, 2, 3)),
    "offset of all": ("shift", lambda p, z: parts(torch.add(p["w"], z)), normal(1), C(4, 3)),
    "normalisation": ("scale", lambda p, z: parts(F.rms_norm(z, (3,), p["w"])), normal(3), C(4, 2, 3)),
    "twice": ("scale", lambda p, z: torch.cat([parts(z * p["w"]), (z.real * p["w"])[:, None]], 1), normal(3), C(4, 3)),
}
OPERATIONS = {
    **{name: Operation(kind, f, {"w": w}, x, [of_units]) for name, (kind, f, w, x) in GAINS.items()},
    "outer": Operation(
        "linear",
        lambda p, z: parts(torch.einsum("nt,d->ntd", z, p["w"])),
        {"w": normal(3)},
        C(4, 2),
        [of_units],
        [lambda p: p["w"].reshape(1, -1, 1)],
    ),
    "mix": Operation(
        "mix",
        lambda p, z: parts(mixed(z, p["w"], p["b"])),
        {"w": normal(2, 3), "b": normal(2)},
        C(4, 2, 3),
        [of_rows, lambda p: p["b"][:, None]],
        [one_matrix, lambda p: p["b"][None, :, None]],
    ),
    "filter": Operation(
        "filter",
        lambda p, x: parts(filtered(x, p["w"]))[..., None],
        {"w": normal(3)},
        normal(4, 5),
        [lambda p: p["w"][None]],
        [lambda p: p["w"][None, None]],
    ),
    "spectral": Operation(
        "spectral", lambda p, x: parts(spectral(x, p["w"])), {"w": normal(2, 3)}, normal(4, 5), [of_rows], [one_matrix]
    ),
    "correlated": Operation(
        "correlated",
        lambda p, z: parts(correlated(z, p["w"])),
        {"w": normal(2, 3, 2)},
        C(4, 3, 3),
        [of_rows],
        [one_matrix],
        channel=-2,
    ),
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


@cache
def evaluated(name, estimator):
    """Layers, parameters, evaluation, and the cotangents by which the reference comes to its statistics."""
    operation = OPERATIONS[name]
    params, model = reference.with_head(operation), partial(reference.network, operation)
    layers = lrkfac.find_layers(model, params, operation.inputs, strict=True, kinds=KINDS)
    assert operation.kind in {layer.kind for layer in layers}
    noise = torch.rand(2, 4, reference.CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    options = {"samples": 2} if estimator == "mc" else {}
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, **options)
    outputs = model(params, operation.inputs)
    labels = {
        "exact": None,
        "mc": torch.stack([lrkfac.categorical().sample(outputs, u) for u in noise]),
        "empirical": TARGETS[None],
    }
    cotangent = None if estimator == "forward_only" else reference.cotangents(outputs, labels[estimator])
    noise = noise if estimator == "mc" else None
    return layers, params, evaluate(params, operation.inputs, TARGETS, noise=noise), cotangent


def flat(tree, params):
    return torch.cat([tree[name].flatten() for name in params])


def places_of(params):
    """The place of each entry of each parameter in the flat gradient."""
    sections = torch.arange(sum(p.numel() for p in params.values())).split([p.numel() for p in params.values()])
    return {name: part.reshape(params[name].shape) for name, part in zip(params, sections, strict=True)}


def natural_gradient(name, estimator, structure):
    layers, params, evaluation, _ = evaluated(name, estimator)
    tx = lrkfac.precondition_by_fisher(layers, structure, damping=DAMPING)
    updates, _ = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
    return flat(updates, params)


def factors(operation, params, cotangent, matrix, reduce=False):
    """``A`` and ``B`` of a layer from its rows; a bias has none for the imaginary parts, which do not depend on it."""
    groups, d_out, d_in = matrix(params).shape
    a = reference.input_rows(operation, operation.params, matrix)
    of_bias = "b" in params and d_in == 1
    used = a.abs().amax((0, 1, 3)) > 0 if of_bias else slice(None)
    g = None if cotangent is None else reference.output_rows(operation, params, cotangent, groups)[:, :, :, used]
    a = a[:, :, used]
    if reduce:
        a, g = a.mean(2, keepdim=True), None if g is None else g.sum(3, keepdim=True)
    return reference.moments(a, g, d_out)


def solved(matrix, gradient, blocks):
    """The gradient, natural by the damped blocks of a matrix at these places."""
    natural = gradient.clone()
    for row in blocks:
        shifted = matrix[row[:, None], row] + DAMPING * torch.eye(len(row), dtype=torch.float64)
        natural[row] = torch.linalg.solve(shifted, gradient[row])
    return natural


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@each_operation
@pytest.mark.parametrize("statistics", [True, False])
def test_gradients_are_those_of_autograd(name, statistics):
    operation = OPERATIONS[name]
    layers, params, _, _ = evaluated(name, "exact")
    model = partial(reference.network, operation)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical", thin=True)
    found = evaluate(params, operation.inputs, TARGETS, statistics=statistics).grads
    expected = grad(lambda p: F.cross_entropy(model(p, operation.inputs), TARGETS))(params)
    close(lrkfac.materialize(found), expected)


@each_operation
@each_estimator
def test_exact_blocks_are_those_of_the_explicit_matrix(name, estimator):
    operation = OPERATIONS[name]
    _, params, evaluation, cotangent = evaluated(name, estimator)
    places, gradient = places_of(params), flat(evaluation.grads, params)
    matrix = reference.fisher_matrix(operation, params, cotangent)
    units = [row for unit in operation.units for row in unit(places)]
    matrices = operation.matrices or [lambda p: operation.units[0](p)[None]]
    blocks = {
        full(): [torch.cat([p.flatten() for p in places.values()])],
        layer_wise(): [*(m(places).flatten() for m in matrices), places["head"].flatten()],
        unit_wise(): [*units, *places["head"]],
        diagonal(): torch.arange(len(gradient))[:, None],
    }
    for structure, rows in blocks.items():
        close(natural_gradient(name, estimator, structure), solved(matrix, gradient, rows))


@each_operation
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "forward_only"])
@pytest.mark.parametrize("treatment", ["expand", "reduce"])
def test_factors_are_those_of_real_and_imaginary_rows(name, estimator, treatment):
    """Scales and shifts, which are no products, have their blocks; without output gradients theirs pass as they are."""
    operation = OPERATIONS[name]
    _, params, evaluation, cotangent = evaluated(name, estimator)
    places, expected = places_of(params), flat(evaluation.grads, params)
    if operation.matrices is None and cotangent is not None:
        units = [row for unit in operation.units for row in unit(places)]
        expected = solved(reference.fisher_matrix(operation, params, cotangent), expected, units)
    for matrix in operation.matrices or []:
        A, B = factors(operation, params, cotangent, matrix, treatment == "reduce")
        expected = reference.preconditioned(matrix(places), expected, A, B, DAMPING)
    A, B = reference.head_factors(operation, params, cotangent)
    expected = reference.preconditioned(places["head"][None], expected, A, B, DAMPING)
    close(natural_gradient(name, estimator, kronecker(dense(), dense(), treatment=treatment)), expected)
    if treatment == "expand":  # at full rank, the factors themselves
        close(natural_gradient(name, estimator, kronecker(low_rank(9), low_rank_plus_diagonal(9))), expected)


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.matrices])
def test_a_structure_corrected_by_moments_has_those_of_the_examples(name):
    """Second moments of the examples' gradients along the eigenvectors of both factors (George et al. 2018)."""
    operation = OPERATIONS[name]
    _, params, evaluation, cotangent = evaluated(name, "exact")
    places, gradient = places_of(params), flat(evaluation.grads, params)
    fisher = reference.fisher_matrix(operation, params, cotangent)
    found = natural_gradient(name, "exact", kronecker(dense(), dense(), corrected=True))
    for matrix in operation.matrices:
        A, B = (x[0] for x in factors(operation, params, cotangent, matrix))
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
    operation = OPERATIONS[name]
    layers, params, reference_evaluation, _ = evaluated(name, "exact")
    model = partial(reference.network, operation)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    evaluation = evaluate(params, operation.inputs.to(dtype.to_complex()), TARGETS)
    torch.testing.assert_close(evaluation.grads, reference_evaluation.grads, rtol=1e-4, atol=1e-5)
    fisher = reference.fisher_matrix(operation, params, evaluated(name, "exact")[3])
    product = flat(evaluation.product(evaluation.grads), params)
    torch.testing.assert_close(product, fisher @ flat(evaluation.grads, params), rtol=1e-4, atol=1e-5)
    for tx in (lrkfac.low_rank_kfac(layers, 0.1), lrkfac.adaptive_low_rank_kfac(layers), lrkfac.kfac(layers, 0.1)):
        updates, _ = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        moved = lrkfac.apply_updates(params, updates)
        assert evaluation.loss_at(moved) < evaluation.loss
        assert all(x.dtype == torch.float64 and x.isfinite().all() for x in moved.values())


def test_micro_batches_and_some_examples_are_those_of_the_batch():
    for name, operation in OPERATIONS.items():
        layers, params, whole, _ = evaluated(name, "exact")
        model = partial(reference.network, operation)
        evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
        merged = lrkfac.merge_evaluations(
            [evaluate(params, x, y) for x, y in zip(operation.inputs.split(2), TARGETS.split(2), strict=True)]
        )
        some = evaluate(params, operation.inputs, TARGETS, examples=torch.arange(4))
        for other in (merged, some):
            torch.testing.assert_close(other.statistics.inputs, whole.statistics.inputs)
            torch.testing.assert_close(other.statistics.output_gradients, whole.statistics.output_gradients)


def test_custom_kinds_of_complex_numbers_pass_their_checks():
    check_layer_kind(mixed, C(4, 2, 3), normal(2, 3), normal(2))
    check_layer_kind(filtered, normal(4, 5), normal(3))
    check_layer_kind(spectral, normal(4, 5), normal(2, 3))
    check_layer_kind(correlated, C(4, 3, 3), normal(2, 3, 2))


# Refused ----------------------------------------------------------------------------------------------


def test_complex_parameters_are_refused_by_name():
    params = {"real": torch.ones(3), "gains": torch.ones(3, dtype=torch.complex64)}
    model = lambda p, x: (torch.fft.rfft(x) * p["gains"]).abs() * p["real"]  # noqa: E731
    with pytest.raises(TypeError, match=r"params: .* got torch.complex64 at 'gains'; .* torch.view_as_complex"):
        lrkfac.find_layers(model, params, torch.ones(2, 5))
    for tx in (lrkfac.trace(0.9), lrkfac.scale_by_adam(), lrkfac.ema_params()):
        with pytest.raises(TypeError, match=r"params: .* got torch.complex64 at 'gains'"):
            tx.init(params)


def test_a_complex_parameter_held_as_a_real_one_has_the_gradient_of_autograd():
    params = {"gains": torch.randn(3, 2, dtype=torch.float64), "head": torch.randn(2, 3, dtype=torch.float64)}
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 1, 0])

    def model(p, x):
        return (torch.fft.rfft(x) * torch.view_as_complex(p["gains"])).abs() @ p["head"].T

    layers = lrkfac.find_layers(model, params, x)
    assert [p.path for p, _ in layers.uncovered] == ["gains"]
    found = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, x, y).grads
    close(found, grad(lambda p: F.cross_entropy(model(p, x), y))(params))


def test_complex_outputs_are_refused():
    params, x = {"s": torch.ones(3)}, torch.ones(2, 5)
    model = lambda p, x: torch.fft.rfft(x) * p["s"]  # noqa: E731
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), lrkfac.find_layers(model, params, x))
    with pytest.raises(ValueError, match=r"model: .* got torch.complex64 of shape \(2, 3\); .* torch.view_as_real"):
        evaluate(params, x, torch.ones(2, 3))


# Transformed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gain of conjugates", "mix"])
@pytest.mark.parametrize(
    "transform",
    [pytest.param(traced, marks=pytest.mark.slow), lambda f: lambda p: vmap(f)({k: x[None] for k, x in p.items()})],
)
def test_steps_in_one_graph_or_mapped_over_are_the_same(name, transform):
    operation = OPERATIONS[name]
    layers, params, _, _ = evaluated(name, "exact")
    evaluate = lrkfac.evaluator(partial(reference.network, operation), lrkfac.categorical(), layers, "exact")
    tx = lrkfac.precondition_by_fisher(layers, damping=DAMPING)

    def step(params):
        evaluation = evaluate(params, operation.inputs, TARGETS)
        return tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[0]

    found, expected = transform(step)(params), step(params)
    close({name: x.reshape(expected[name].shape) for name, x in found.items()}, expected)
