"""The references themselves: each is checked against autograd, an identity or a second formula."""

import itertools

import pytest
import torch
from torch.nn import functional

from tests import cases, reference, reference_networks, reference_optimizers

each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
each_discrete_case = pytest.mark.parametrize(
    "case", [case for case in cases.ALL if case.likelihood != "gaussian"], ids=lambda case: case.name
)


def assert_close(actual, expected, rtol=1e-10, atol=1e-13):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


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
        assert_close(a @ matrix.mT, reference.layer_output_rows(layer, outputs))
        g = reference.layer_output_rows(layer, g)
        expected = reference_networks.gradient_matrix(case, name, grads)
        assert_close(g.mT @ a / terms, expected)
        for parameter, leaf in reference_networks.layer_gradients(case, name, expected).items():
            assert_close(leaf, grads[parameter])


def test_convolution_1x1_equals_linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 2, generator=generator, dtype=torch.float64)
    for bias in (False, True):
        expected = reference.linear_input_factor(x.permute(0, 2, 3, 1), bias)
        assert_close(reference.conv2d_input_factor(x, (7, 4, 1, 1), bias=bias), expected)
    expected = reference.linear_output_factor(x.permute(0, 2, 3, 1), number_of_terms=3)
    assert_close(expected[0], torch.einsum("ncij,ndij->cd", x, x) / 3)
    assert_close(reference.conv2d_output_factor(x, number_of_terms=3), expected)


def test_groups_are_convolutions_of_channel_slices():
    x = torch.arange(2 * 4 * 4 * 3, dtype=torch.float64).sin().reshape(2, 4, 4, 3)
    grouped = reference.conv2d_input_factor(x, (6, 2, 2, 2), padding="same", groups=2)
    for factor, part in zip(grouped, x.split(2, 1), strict=True):
        assert_close(factor[None], reference.conv2d_input_factor(part, (3, 2, 2, 2), padding="same"))


@each_case
def test_likelihood_against_torch_and_hessian(case):
    outputs, options = case.model(case.params, case.inputs), case.likelihood_options
    nll = reference.negative_log_likelihood(case.likelihood, outputs, case.targets, **options)
    if case.likelihood == "categorical":
        classes = outputs.movedim(-1, 1)
        expected = functional.cross_entropy(classes, case.targets, reduction="none").flatten()
    elif case.likelihood == "bernoulli":
        each = functional.binary_cross_entropy_with_logits(outputs, case.targets, reduction="none")
        expected = each.sum(-1)
    else:
        normal = torch.distributions.Normal(outputs, options["variance"] ** 0.5)
        each = normal.log_prob(outputs) - normal.log_prob(case.targets)
        expected = each.reshape(len(each), -1).sum(-1)
    assert_close(nll, expected)
    hessian = reference.output_hessian(case.likelihood, outputs, **options)
    whole = hessian_of(
        lambda f: reference.negative_log_likelihood(case.likelihood, f, case.targets, **options).sum(),
        outputs,
    )
    assert_close(torch.block_diag(*hessian), whole.reshape(outputs.numel(), outputs.numel()))
    root = reference.output_hessian_root(case.likelihood, outputs, **options)
    assert_close(root @ root.mT, hessian)
    if case.likelihood != "gaussian":
        _, probabilities = reference.label_distribution(case.likelihood, outputs)
        assert_close(probabilities.sum(-1), torch.ones(len(probabilities), dtype=torch.float64))


@each_discrete_case
def test_exact_is_expectation_of_monte_carlo(case):
    expected = reference_networks.expected_monte_carlo_output_factors(case)
    for name, factor in reference_networks.exact_output_factors(case).items():
        assert_close(factor, expected[name])


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
        assert_close(factor, total[name])


@each_case
def test_empirical_factor_by_one_example_at_a_time(case):
    """Examples do not share rows, so the sum over rows is the sum over batches of one."""
    total, terms = {}, 0
    for n in range(len(case.inputs)):
        one = case._replace(inputs=case.inputs[n : n + 1], targets=case.targets[n : n + 1])
        terms += reference_networks.number_of_terms(one)
        for name, factor in reference_networks.empirical_output_factors(one).items():
            total[name] = total.get(name, 0) + factor * reference_networks.number_of_terms(one)
    for name, factor in reference_networks.empirical_output_factors(case).items():
        assert_close(factor, total[name] / terms)


@pytest.mark.parametrize("case", cases.EXACT, ids=lambda case: case.name)
def test_kfac_equals_gauss_newton_block(case):
    for name, (A, B) in reference_networks.factors(case, "exact").items():
        assert_close(torch.kron(B[0], A[0]), reference_networks.gauss_newton_blocks(case, name)[0])


@each_case
def test_blocks_are_parts_of_gauss_newton_matrix(case):
    """The blocks are the rows and columns of the whole matrix that belong to a group's [W b]."""
    whole = reference_networks.gauss_newton_matrix(case)
    assert_close(whole, whole.T)
    positions = {}
    for name, p in case.params.items():
        start = sum(map(torch.numel, positions.values()))
        positions[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
    for name in case.layers:
        order = reference_networks.gradient_matrix(case, name, positions).flatten(1)
        blocks = torch.stack([whole[o][:, o] for o in order])
        assert_close(reference_networks.gauss_newton_blocks(case, name), blocks)


def test_gauss_newton_is_hessian_of_linear_regression():
    case = cases.make_case("one_layer", (cases.linear(3, 2),), (5, 3), "gaussian", seed=1, variance=0.5)
    hessian = hessian_of(lambda p: reference_networks.loss(case, p), case.params)
    rows = [
        torch.cat([h.flatten(p.ndim).flatten(0, p.ndim - 1) for h in hessian[n].values()], -1)
        for n, p in case.params.items()
    ]
    assert_close(reference_networks.gauss_newton_matrix(case), torch.cat(rows))


def test_truncation_errors_are_those_of_the_spectrum():
    matrix, rank = psd_matrix(8) - 0.5 * torch.eye(8, dtype=torch.float64), 3
    values = torch.linalg.eigvalsh(matrix)
    rest = values[values.abs().argsort()][: 8 - rank]
    plain = reference.truncated(matrix, rank)
    assert_close((matrix - plain).norm(), rest.norm())
    isotropic = reference.truncated(matrix, rank, "isotropic")
    assert_close((matrix - isotropic).norm(), (rest - rest.mean()).norm())
    assert_close(isotropic.trace(), matrix.trace())
    assert_close(reference.truncated(matrix, 9, "isotropic"), matrix)


def test_alternating_fit():
    """It recovers low rank plus diagonal, and never does worse than truncation plus the missing diagonal."""
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    D = torch.rand(12, generator=generator, dtype=torch.float64)
    vectors, values, diagonal = reference.low_rank_plus_diagonal_dense(U @ U.T + torch.diag(D), 2)
    assert_close(diagonal, D, rtol=1e-6, atol=1e-6)
    assert_close(vectors * values @ vectors.T, U @ U.T, rtol=1e-6, atol=1e-6)
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
    assert_close(delta_A * delta_B, torch.tensor(0.1, dtype=torch.float64))
    assert_close(delta_A / delta_B, (A.trace() / 4) / (B.trace() / 3))
    whole = torch.kron(reference.damped(B, delta_B), reference.damped(A, delta_A))
    expected = torch.linalg.solve(whole, G.flatten()).reshape(G.shape)
    assert_close(reference.kronecker_preconditioned(G, A, B, 0.1), expected)
    assert_close(reference.kronecker_preconditioned(G, 7 * A, B / 7, 0.1), expected)
    assert_close(reference.damped_inverse(A, 0.3) @ reference.damped(A, 0.3), torch.eye(4, dtype=torch.float64))


def test_running_average_is_weighted_mean():
    matrices, decay = [psd_matrix(3, seed) for seed in range(5)], 0.8
    for t, average in enumerate(reference.running_averages(matrices, decay), start=1):
        weights = [decay ** (t - s) for s in range(1, t + 1)]
        expected = sum(w * m for w, m in zip(weights, matrices, strict=False)) / sum(weights)
        assert_close(average, expected)
    assert_close(reference.running_averages(matrices, 0.0)[-1], matrices[-1])


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_optimizers_equal_torch(optimizer):
    """torch.optim's SGD with momentum and AdamW, five steps on a quartic."""
    lr, start = 0.05, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    leaf = start.clone().requires_grad_()
    torch_optimizer = {
        "sgd": lambda: torch.optim.SGD([leaf], lr, momentum=0.9),
        "nesterov": lambda: torch.optim.SGD([leaf], lr, momentum=0.9, nesterov=True),
        "adamw": lambda: torch.optim.AdamW([leaf], lr, weight_decay=0.1),
    }[optimizer]()
    params, history = {"w": start}, []
    for _ in range(5):
        torch_optimizer.zero_grad()
        (leaf**4).sum().backward()
        torch_optimizer.step()
        history.append({"w": 4 * params["w"] ** 3})
        if optimizer == "adamw":
            updates = reference_optimizers.adam(history)[-1]
            updates = reference_optimizers.decayed_weights_added(updates, params, 0.1)
        else:
            updates = reference_optimizers.momentum_trace(history, 0.9, optimizer == "nesterov")[-1]
        params = {"w": params["w"] - lr * updates["w"]}
        assert_close(params["w"], leaf.detach(), rtol=1e-9)


def test_clipping():
    updates = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    assert_close(reference_optimizers.clipped_by_global_norm(updates, 1.0)["a"], torch.tensor([0.6]), 1e-6)
    assert reference_optimizers.clipped_by_global_norm(updates, 6.0)["b"] == 4.0
    clipped = reference_optimizers.clipped_by_kl(updates, updates, 0.1, 1e-2)
    assert_close(clipped["a"] ** 2 + clipped["b"][0] ** 2, torch.tensor([1.0]), 1e-6)
    assert reference_optimizers.kl_clip_factor(updates, updates, 0.1, 1.0) == 1.0


def test_schedules():
    values = [reference_optimizers.warmup_cosine_decay_schedule(t, 2.0, 4, 12) for t in (0, 2, 4, 8, 12, 20)]
    assert values == pytest.approx([0, 1, 2, 1, 0, 0])
    assert reference_optimizers.exponential_decay(6, 2.0, 0.5, 3) == 0.5
    values = [reference_optimizers.piecewise_constant_schedule(t, [2, 5], [1, 2, 3]) for t in (1, 2, 4, 5)]
    assert values == [1, 2, 2, 3]


@pytest.mark.parametrize("case", cases.EXACT[:3], ids=lambda case: case.name)
def test_dense_step_is_newton_on_the_block(case):
    """Where K-FAC is exact and the damping nearly zero, one step solves with the Gauss-Newton block."""
    step = reference_networks.dense_kfac_step(case, damping=1e-24, learning_rate=0.5, weight_decay=0.1)
    for name in case.layers:
        matrix = reference_networks.gradient_matrix(case, name, step.gradients)
        block = reference_networks.gauss_newton_blocks(case, name)[0]
        solution = reference_networks.gradient_matrix(case, name, step.preconditioned)
        assert_close(block @ solution.flatten(), matrix.flatten(), rtol=1e-7, atol=1e-9)
    for name, p in case.params.items():
        assert_close(step.params[name], p - 0.5 * (step.preconditioned[name] + 0.1 * p))


@each_case
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_dense_steps_descend(case, estimator):
    """Three steps lower the loss, with averaged factors and a momentum trace as their own references say."""
    start, state, steps = reference_networks.loss(case), None, []
    for _ in range(3):
        steps.append(
            reference_networks.dense_kfac_step(
                case, state, estimator=estimator, learning_rate=0.02, decay=0.8, momentum=0.5
            )
        )
        case, state = case._replace(params=steps[-1].params), steps[-1].state
    assert reference_networks.loss(case) < start
    traces = reference_optimizers.momentum_trace([step.preconditioned for step in steps], 0.5)
    for name in case.layers:
        A = reference.running_averages([step.factors[name].A for step in steps], 0.8)[-1]
        B = reference.running_averages([step.factors[name].B for step in steps], 0.8)[-1]
        assert_close(state.averages[name].A, A)
        assert_close(state.averages[name].B, B)
    for name, update in steps[-1].updates.items():
        assert_close(update, -0.02 * traces[-1][name])
