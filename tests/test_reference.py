"""The references themselves: each is checked against autograd, an identity or a second formula."""

import itertools

import pytest
import torch

from tests import cases, reference, reference_networks, reference_optimizers
from tests.tensors import close

each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
each_discrete_case = pytest.mark.parametrize(
    "case", [case for case in cases.ALL if case.likelihood != "gaussian"], ids=lambda case: case.name
)


def hessian_of(function, point):
    return torch.func.jacrev(torch.func.grad(function))(point)


def psd_matrix(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
    return rows.T @ (rows * torch.logspace(0, -2, 3 * d, dtype=torch.float64)[:, None])


@each_case
def test_rows_reproduce_layer_and_gradient(case):
    """Rows times [W b] are the layer's outputs; (1/M) Σ g aᵀ is autograd's gradient."""
    _, inputs = reference_networks.forward(case)
    grads = reference_networks.gradients(case)
    terms = reference_networks.number_of_terms(case)
    for name, g in reference_networks.output_gradients(case).items():
        layer = case.layers[name]
        a = reference.layer_input_rows(layer, inputs[name])
        matrix = reference_networks.gradient_matrix(case, name, case.params)
        outputs = cases.apply_stage(layer, name, case.params, inputs[name])
        close(a @ matrix.mT, reference.layer_output_rows(layer, outputs))
        g = reference.layer_output_rows(layer, g)
        expected = reference_networks.gradient_matrix(case, name, grads)
        close(g.mT @ a / terms, expected)
        for parameter, leaf in reference_networks.layer_gradients(case, name, expected).items():
            close(leaf, grads[parameter])


@each_case
def test_hessian_root_and_distribution_of_labels(case):
    outputs, options = case.model(case.params, case.inputs), case.likelihood_options
    hessian = reference.output_hessian(case.likelihood, outputs, **options)
    nll = lambda f: reference.negative_log_likelihood(case.likelihood, f, case.targets, **options).sum()  # noqa: E731
    close(torch.block_diag(*hessian), hessian_of(nll, outputs).reshape(outputs.numel(), outputs.numel()))
    root = reference.output_hessian_root(case.likelihood, outputs, **options)
    close(root @ root.mT, hessian)
    if case.likelihood != "gaussian":
        _, probabilities = reference.label_distribution(case.likelihood, outputs)
        close(probabilities.sum(-1), torch.ones(len(probabilities), dtype=torch.float64))


@each_discrete_case
def test_exact_is_expectation_over_joint_labels(case):
    """All combinations of labels of one example, each through autograd's gradient of the whole loss."""
    case = case._replace(inputs=case.inputs[:1])
    outputs = case.model(case.params, case.inputs)
    labels, probabilities = reference.label_distribution(case.likelihood, outputs)
    total = dict.fromkeys(case.layers, 0)
    for choice in itertools.product(range(len(labels)), repeat=len(probabilities)):
        targets = torch.stack([labels[i] for i in choice])
        shape = outputs.shape[:-1] if case.likelihood == "categorical" else outputs.shape
        drawn = case._replace(targets=targets.reshape(shape))
        probability = torch.stack([p[i] for p, i in zip(probabilities, choice, strict=True)]).prod()
        for name, factor in reference_networks.empirical_output_factors(drawn).items():
            total[name] = total[name] + probability * factor
    for name, factor in reference_networks.exact_output_factors(case).items():
        close(factor, total[name])


@pytest.mark.parametrize("case", cases.EXACT, ids=lambda case: case.name)
def test_kfac_equals_gauss_newton_block(case):
    for name, (A, B) in reference_networks.factors(case, "exact").items():
        close(torch.kron(B[0], A[0]), reference_networks.gauss_newton_blocks(case, name)[0])


def test_gauss_newton_is_hessian_of_linear_regression():
    case = cases.make_case("one_layer", (cases.linear(3, 2),), (5, 3), "gaussian", seed=1, variance=0.5)
    hessian = hessian_of(lambda p: reference_networks.loss(case, p), case.params)
    rows = [
        torch.cat([h.flatten(p.ndim).flatten(0, p.ndim - 1) for h in hessian[n].values()], -1)
        for n, p in case.params.items()
    ]
    close(reference_networks.gauss_newton_matrix(case), torch.cat(rows))


def test_alternating_fit():
    """It recovers low rank plus diagonal."""
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    D = torch.rand(12, generator=generator, dtype=torch.float64)
    vectors, values, diagonal = reference.low_rank_plus_diagonal_dense(U @ U.T + torch.diag(D), 2)
    close(diagonal, D, rtol=1e-6, atol=1e-6)
    close(vectors * values @ vectors.T, U @ U.T, rtol=1e-6, atol=1e-6)


def test_damping_split_and_preconditioning():
    """The damped factors' product is that of the Kronecker matrix; rescaling A against B changes nothing."""
    A, B, G = psd_matrix(4, 1), psd_matrix(3, 2), psd_matrix(4, 3)[:3]
    delta_A, delta_B = reference.damping_split(A, B, 0.1)
    close(delta_A * delta_B, torch.tensor(0.1, dtype=torch.float64))
    close(delta_A / delta_B, (A.trace() / 4) / (B.trace() / 3))
    whole = torch.kron(reference.damped(B, delta_B), reference.damped(A, delta_A))
    expected = torch.linalg.solve(whole, G.flatten()).reshape(G.shape)
    close(reference.kronecker_preconditioned(G, A, B, 0.1), expected)
    close(reference.kronecker_preconditioned(G, 7 * A, B / 7, 0.1), expected)
    close(reference.damped_inverse(A, 0.3) @ reference.damped(A, 0.3), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_equals_torchs(nesterov):
    """Five steps on a quartic."""
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    leaf, params, history = start.clone().requires_grad_(), start, []
    optimizer = torch.optim.SGD([leaf], 0.05, momentum=0.9, nesterov=nesterov)
    for _ in range(5):
        optimizer.zero_grad()
        (leaf**4).sum().backward()
        optimizer.step()
        history.append({"w": 4 * params**3})
        params = params - 0.05 * reference_optimizers.momentum_trace(history, 0.9, nesterov)[-1]["w"]
        close(params, leaf.detach(), rtol=1e-9)
