"""Gauss-Newton, Fisher and Hessian matrices over batches: dense references, trees and flat vectors, loaders, SciPy."""

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import lrkfac
from lrkfac.core.base.flat import flattened, unflattened
from lrkfac.curvature import fisher_product, ggn, hessian
from tests import cases
from tests.tensors import close, normal

LIKELIHOODS = {"categorical": lrkfac.categorical, "gaussian": lrkfac.gaussian, "bernoulli": lrkfac.bernoulli}
CASES = [case for case in cases.LINEAR if case.name in ("tanh_categorical", "tanh_gaussian", "tanh_bernoulli")]
OF_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def likelihood_of(case):
    return LIKELIHOODS[case.likelihood](**case.likelihood_options)


def dense(case, loss, of_outputs=False):
    """The Hessian in the flat parameters of the loss, or of it at linearised outputs."""

    def outputs(x):
        return case.model(unflattened(x, case.params), case.inputs)

    start = flattened(case.params)
    if of_outputs:
        at, jacobian = outputs(start), torch.func.jacrev(outputs)(start).flatten(0, -2)
        inner = torch.func.hessian(lambda f: loss(f.reshape(at.shape), case.targets))(at.flatten())
        return jacobian.mT @ inner @ jacobian
    return torch.func.hessian(lambda x: loss(outputs(x), case.targets))(start)


@OF_CASES
def test_matrices_are_those_of_automatic_differentiation(case):
    likelihood, data = likelihood_of(case), [(case.inputs, case.targets)]
    expected = dense(case, likelihood.loss, of_outputs=True)
    close(ggn(case.model, likelihood)(case.params, data).to_dense(), expected)
    close(fisher_product(case.model, likelihood)(case.params, data).to_dense(), expected)
    close(hessian(case.model, likelihood)(case.params, data).to_dense(), dense(case, likelihood.loss))


@pytest.mark.parametrize("make", [ggn, fisher_product, hessian])
def test_batches_of_unequal_weight_are_one_whatever_iterates_over_them(make):
    case = CASES[0]
    targets = case.targets.clone()
    targets[:2] = -1  # the weight of a batch is the number of targets that count
    at = make(case.model, lrkfac.categorical(ignore_index=-1), chunk=3)
    whole = at(case.params, [(case.inputs, targets)])
    loader = DataLoader(TensorDataset(case.inputs, targets), batch_size=3)
    parts = at(case.params, loader)
    columns = normal(whole.dimension, 7)
    close(parts.matvec(columns), whole.matvec(columns))
    close(parts.matvec(columns[:, 0]), parts.matvec(columns)[:, 0])
    tangent = unflattened(columns[:, 0], case.params)
    close(flattened(parts.product(tangent)), whole.matvec(columns[:, 0]))


def test_heads_containers_auxiliary_results_and_half_precision():
    params = {"w": normal(3, 4, seed=1), "b": normal(2, seed=2).float()}

    def model(params, inputs):
        y = torch.tanh(inputs["x"] @ params["w"])
        return {"a": y[:, :2] + params["b"], "b": y[:, 2:]}, y.sum()

    likelihood = lrkfac.joint({"a": lrkfac.gaussian(), "b": lrkfac.categorical()}, weights={"a": 0.5, "b": 2.0})
    data = [({"x": normal(5, 3)}, {"a": normal(5, 2, seed=3), "b": torch.tensor([0, 1, 1, 0, 1])})]
    found = ggn(model, likelihood, has_aux=True)(params, data)
    close(found.to_dense(), fisher_product(model, likelihood, has_aux=True)(params, data).to_dense(), atol=1e-6)
    assert found.dimension == 14 and found.product(params)["b"].dtype == torch.float32


def test_a_custom_likelihood_tells_the_hessian_from_the_fisher_matrix():
    cauchy = lrkfac.Likelihood(
        "cauchy",
        negative_log_likelihood=lambda f, y: torch.log1p((f - y) ** 2).sum(1),
        sample=lambda f, noise: f + torch.tan(torch.pi * (noise - 0.5)),
        square_root=lambda f, c: c * 0.5**0.5,
    )
    params, x, y = {"w": torch.zeros(1, 1)}, torch.ones(4, 1), torch.tensor([[0.0], [1.0], [2.0], [0.0]])
    at = ((make(lambda p, x: x @ p["w"], cauchy)(params, [(x, y)]).to_dense()) for make in (ggn, fisher_product))
    second = 2 * (1 - y**2) / (1 + y**2) ** 2
    close(next(at), second.mean().reshape(1, 1), atol=1e-6)
    close(next(at), torch.full((1, 1), 0.5), atol=1e-6)


def test_a_model_that_cannot_be_mapped_goes_column_by_column():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

        @staticmethod
        def jvp(ctx, t):
            return 2 * ctx.saved_tensors[0] * t

    params, data = {"w": normal(2, 2)}, [(normal(3, 2), normal(3, 2, seed=1))]
    found = ggn(lambda p, x: Square.apply(x @ p["w"]), lrkfac.gaussian())(params, data)
    plain = ggn(lambda p, x: (x @ p["w"]) ** 2, lrkfac.gaussian())(params, data)
    close(found.to_dense(), plain.to_dense())


def test_modules_without_layers_and_their_parameters_keep_no_graph():
    gru = nn.GRU(3, 4, batch_first=True).double()
    params = dict(gru.named_parameters())

    def model(params, x):
        return functional_call(gru, params, (x,))[0][:, -1]

    found = ggn(model, lrkfac.gaussian())(params, [(normal(2, 5, 3), normal(2, 4))])
    product = found.product({name: torch.ones_like(x) for name, x in params.items()})
    assert not any(x.requires_grad for x in optree.tree_leaves(product))


def test_scipy_sees_the_same_matrix():
    scipy = pytest.importorskip("scipy.sparse.linalg")
    case = CASES[1]
    found = ggn(case.model, likelihood_of(case))(case.params, [(case.inputs, case.targets)])
    values = torch.as_tensor(scipy.eigsh(found.as_scipy(), k=3, return_eigenvectors=False)).sort().values
    close(values, torch.linalg.eigvalsh(found.to_dense())[-3:], rtol=1e-8, atol=0)


def test_solvers_and_spectra_take_these_operators_as_they_are():
    case = CASES[0]
    found = ggn(case.model, likelihood_of(case))(case.params, [(case.inputs, case.targets)])
    matrix, b = found.to_dense(), case.params
    solution = lrkfac.linalg.conjugate_gradient(found, b, damping=0.1, tolerance=1e-12).solution
    close(
        flattened(solution), torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix)).double(), flattened(b)), atol=1e-9
    )
    generator = torch.Generator().manual_seed(0)
    density = lrkfac.curvature.spectral_density(found, 2, 5, generator)
    assert density.nodes.shape == (2, 5) and int(density.dimension) == found.dimension
    estimate = lrkfac.linalg.diagonal_estimate(found, 60, generator)
    assert optree.tree_structure(estimate.value) == optree.tree_structure(case.params)
    close(flattened(estimate.value), matrix.diagonal(), atol=1e-9)
    every = torch.eye(found.dimension).double()
    exact = lrkfac.curvature.spectral_density(found, found.dimension, 25, noise=every)
    for power in range(1, 6):
        expected = torch.linalg.matrix_power(matrix, power).trace() / len(matrix)
        close(exact.moment(power), expected, rtol=1e-8, atol=0)
