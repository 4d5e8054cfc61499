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


def test_groups_are_convolutions_of_channel_slices():
    x = torch.arange(2 * 4 * 4 * 3, dtype=torch.float64).sin().reshape(2, 4, 4, 3)
    grouped = reference.conv2d_input_factor(x, (6, 2, 2, 2), padding="same", groups=2)
    for factor, part in zip(grouped, x.split(2, 1), strict=True):
        close(factor[None], reference.conv2d_input_factor(part, (3, 2, 2, 2), padding="same"))


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


def test_truncation_errors_are_those_of_the_spectrum():
    matrix, rank = psd_matrix(8) - 0.5 * torch.eye(8, dtype=torch.float64), 3
    values = torch.linalg.eigvalsh(matrix)
    rest = values[values.abs().argsort()][: 8 - rank]
    plain = reference.truncated(matrix, rank)
    close((matrix - plain).norm(), rest.norm())
    isotropic = reference.truncated(matrix, rank, "isotropic")
    close((matrix - isotropic).norm(), (rest - rest.mean()).norm())
    close(isotropic.trace(), matrix.trace())
    close(reference.truncated(matrix, 9, "isotropic"), matrix)


def test_alternating_fit():
    """It recovers low rank plus diagonal, and never does worse than truncation plus the missing diagonal."""
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    D = torch.rand(12, generator=generator, dtype=torch.float64)
    vectors, values, diagonal = reference.low_rank_plus_diagonal_dense(U @ U.T + torch.diag(D), 2)
    close(diagonal, D, rtol=1e-6, atol=1e-6)
    close(vectors * values @ vectors.T, U @ U.T, rtol=1e-6, atol=1e-6)
    matrix = psd_matrix(8)
    for rank in (1, 3, 8):
        vectors, values, diagonal = reference.low_rank_plus_diagonal_dense(matrix, rank)
        assert (diagonal >= 0).all() and (values >= 0).all()
        error = (matrix - vectors * values @ vectors.T - torch.diag(diagonal)).norm()
        rest = matrix - reference.truncated(matrix, rank)
        assert error <= (rest - torch.diag(rest.diagonal())).norm() + 1e-10


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


def test_running_average_is_weighted_mean():
    matrices, decay = [psd_matrix(3, seed) for seed in range(5)], 0.8
    for t, average in enumerate(reference.running_averages(matrices, decay), start=1):
        weights = [decay ** (t - s) for s in range(1, t + 1)]
        expected = sum(w * m for w, m in zip(weights, matrices, strict=False)) / sum(weights)
        close(average, expected)
    close(reference.running_averages(matrices, 0.0)[-1], matrices[-1])


OPTIMIZERS = {
    "sgd": lambda leaf: torch.optim.SGD([leaf], 0.05, momentum=0.9),
    "nesterov": lambda leaf: torch.optim.SGD([leaf], 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda leaf: torch.optim.AdamW([leaf], 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_equal_torch(optimizer):
    """Five steps on a quartic."""
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    leaf, params, history = start.clone().requires_grad_(), {"w": start}, []
    of_torch = OPTIMIZERS[optimizer](leaf)
    for _ in range(5):
        of_torch.zero_grad()
        (leaf**4).sum().backward()
        of_torch.step()
        history.append({"w": 4 * params["w"] ** 3})
        if optimizer == "adamw":
            updates = reference_optimizers.decayed_weights_added(reference_optimizers.adam(history)[-1], params, 0.1)
        else:
            updates = reference_optimizers.momentum_trace(history, 0.9, optimizer == "nesterov")[-1]
        params = {"w": params["w"] - 0.05 * updates["w"]}
        close(params["w"], leaf.detach(), rtol=1e-9)


@pytest.mark.parametrize("case", cases.EXACT[:3], ids=lambda case: case.name)
def test_dense_step_is_newton_on_the_block(case):
    """Where K-FAC is exact and the damping nearly zero, one step solves with the Gauss-Newton block."""
    step = reference_networks.dense_kfac_step(case, damping=1e-24)
    for name in case.layers:
        matrix = reference_networks.gradient_matrix(case, name, step.gradients)
        block = reference_networks.gauss_newton_blocks(case, name)[0]
        solution = reference_networks.gradient_matrix(case, name, step.preconditioned)
        close(block @ solution.flatten(), matrix.flatten(), rtol=1e-7, atol=1e-9)
