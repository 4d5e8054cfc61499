"""The Laplace posterior against the dense precision matrix and the Jacobian of the outputs."""

import pytest
import torch

import lrkfac
from lrkfac.curvature import estimate, laplace
from lrkfac.structures import dense, full, kronecker, low_rank, low_rank_plus_diagonal, unit_wise
from tests.core.curvature.test_layer_blocks import flat
from tests.core.inference.test_estimate import GROUPS, MLP, arguments
from tests.tensors import close

STRUCTURES = {"full": full(), "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(1)), "unit": unit_wise()}
CASES = [(MLP, "full"), (MLP, "low rank"), (GROUPS, "low rank"), (GROUPS, "unit")]
each = pytest.mark.parametrize("case, name", CASES, ids=lambda x: x if isinstance(x, str) else x.name)
DELTA = 0.7


def made(case, name, layers=None):
    evaluate, params, batches, _ = given = arguments(case, [len(case.inputs)])
    fisher = estimate(*given, STRUCTURES[name])
    fisher = fisher if layers is None else fisher.of_layers(layers)
    loss = evaluate(params, *batches[0], statistics=False).loss
    return laplace(fisher, params, 10, DELTA), 10 * fisher.to_dense(), loss


def jacobian(case):
    leaves = torch.func.jacrev(lambda p: case.model(p, case.inputs).flatten(1))(case.params)
    return torch.cat([leaves[name].flatten(2) for name in sorted(leaves)], dim=-1)


@each
def test_predictions_and_draws_are_those_of_the_dense_posterior(case, name):
    posterior, M, _ = made(case, name)
    precision = M + DELTA * torch.eye(len(M), dtype=M.dtype)
    J = jacobian(case)
    found = posterior.predictive(case.model, case.inputs)
    close(found.mean, case.model(case.params, case.inputs).flatten(1))
    close(found.covariance, J @ torch.linalg.solve(precision, J.mT), rtol=1e-8)
    half = torch.stack([flat(posterior.root.matvec(one)) for one in basis(case, len(M))], dim=1)
    close(half @ half.mT, torch.linalg.inv(precision), rtol=1e-8)


def basis(case, size):
    trees = []
    for row in torch.eye(size, dtype=torch.float64):
        names = sorted(case.params)
        parts = row.split([case.params[name].numel() for name in names])
        trees.append({name: x.reshape(case.params[name].shape) for name, x in zip(names, parts, strict=True)})
    return trees


@each
def test_the_evidence_and_its_derivative(case, name):
    posterior, M, loss = made(case, name)
    theta = flat({name: case.params[name] for name in sorted(case.params)})

    def expected(delta):
        precision = M + delta * torch.eye(len(M), dtype=M.dtype)
        prior = len(M) * delta.log() - delta * theta @ theta
        return -10 * loss + (prior - torch.logdet(precision)) / 2

    at = torch.tensor(2.0, dtype=torch.float64)
    close(posterior.log_evidence(loss, at), expected(at), rtol=1e-9)
    close(posterior.log_evidence(loss), expected(torch.tensor(DELTA, dtype=torch.float64)), rtol=1e-9)
    slopes = [torch.func.grad(f)(at) for f in (lambda d: posterior.log_evidence(loss, d), expected)]
    close(*slopes, rtol=1e-8)


def test_of_the_last_layer_others_stay_at_the_mean():
    posterior, M, loss = made(MLP, "low rank", ["4"])
    noise = {name: torch.stack([torch.randn_like(x)] * 3) for name, x in MLP.params.items()}
    drawn = torch.func.vmap(posterior.sample)(noise)
    assert torch.equal(drawn["0.weight"][0], MLP.params["0.weight"])
    assert not torch.equal(drawn["4.weight"][0], MLP.params["4.weight"])
    outputs = posterior.draws(MLP.model, MLP.inputs, noise)
    close(outputs[1], MLP.model({name: x[1] for name, x in drawn.items()}, MLP.inputs))
    inside = torch.cat([MLP.params[f"4.{x}"].reshape(-1) for x in ("bias", "weight")])
    covered = M.diagonal() > 0
    precision = (M + DELTA * torch.eye(len(M), dtype=M.dtype))[covered][:, covered]
    prior = len(inside) * torch.tensor(DELTA, dtype=torch.float64).log() - DELTA * inside @ inside
    close(posterior.log_evidence(loss), -10 * loss + (prior - torch.logdet(precision)) / 2, rtol=1e-9)


def test_products_of_two_without_eigenvectors_are_refused():
    structure = kronecker(low_rank_plus_diagonal(1), low_rank_plus_diagonal(1))
    fisher = estimate(*arguments(MLP, [7]), structure)
    with pytest.raises(TypeError, match="both are LowRankPlusDiagonal"):
        laplace(fisher, MLP.params, 7)


def test_dependent_examples_have_no_linearised_prediction():
    case = MLP
    model = lambda params, x: case.model(params, x) - case.model(params, x).mean(0)  # noqa: E731
    layers = lrkfac.find_layers(model, case.params, case.inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
    fisher = estimate(evaluate, case.params, [(case.inputs, case.targets)], layers, kronecker(dense(), dense()))
    with pytest.raises(ValueError, match="depends on another example"):
        laplace(fisher, case.params, 7).predictive(model, case.inputs)
