"""Layers of every kind, likelihoods and evaluations on the device: what they are on the CPU, in float64."""

from functools import cache, partial
from operator import attrgetter

import pytest
import torch

import lrkfac
from lrkfac.core.base.dtypes import most_precise
from lrkfac.testing import check_layer_kind, check_likelihood
from tests import cases, reference_kinds
from tests.core.evaluation.test_evaluator import evaluator_of, noise_for
from tests.core.layers.test_custom import KINDS
from tests.device.conftest import name_of_device
from tests.device.moving import close, moved, moved_case, on_device
from tests.tensors import normal
from tests.test_check_layer_kind import ARGUMENTS

OPERATIONS = reference_kinds.operations()
TARGETS = torch.tensor([2, 0, 1, 1])


@cache
def of_operation(name, device, dtype):
    """The model, its layers, parameters and inputs."""
    operation = OPERATIONS[name]
    operation = operation._replace(**moved({"params": operation.params, "inputs": operation.inputs}, device, dtype))
    params = moved(reference_kinds.with_head(operation._replace(params=operation.params)), device, dtype)
    model = partial(reference_kinds.network, operation)
    uncovered = "jacobian" if name == "jacobian" else "plain"
    layers = lrkfac.find_layers(model, params, operation.inputs, strict=True, uncovered=uncovered)
    return model, layers, params, operation.inputs


def evaluated(name, device, dtype, estimator):
    model, layers, params, inputs = of_operation(name, device, dtype)
    noise = moved(torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), device, dtype)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)
    noise = noise if estimator == "mc" else None
    return layers, evaluate(params, inputs, TARGETS.to(device), noise=noise)


# On the CPU, where the others are known in float64, the rows of all columns.
ESTIMATORS = ["exact"] if name_of_device() == "cpu" else ["mc", "exact", "empirical", "forward_only"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kind_of_layer(device, dtype, name, estimator):
    found, expected = (evaluated(name, *where, estimator) for where in ((device, dtype), ("cpu", torch.float64)))
    assert found[0] == expected[0]
    for field in ("loss", "grads", "statistics"):
        leaves = getattr(found[1], field), getattr(expected[1], field)
        assert on_device(leaves[0], device)
        close(*leaves, 1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", cases.ALL, ids=attrgetter("name"))
def test_every_network(device, dtype, case):
    """And products with the Fisher matrix."""
    there = moved_case(case, device, dtype)
    found, expected = (
        evaluator_of(one)(one.params, one.inputs, one.targets, noise=moved(noise_for(case), *where))
        for one, where in ((there, (device, dtype)), (case, ("cpu", None)))
    )
    tangents = there.params, case.params
    for of in (attrgetter("loss"), attrgetter("grads"), attrgetter("statistics"), attrgetter("outputs")):
        assert on_device(of(found), device)
        close(of(found), of(expected), 1e4 * torch.finfo(dtype).eps)
    products = found.product(tangents[0]), expected.product(tangents[1])
    assert on_device(products[0], device)
    close(*products, 1e4 * torch.finfo(dtype).eps)
    close(found.quadratic(*[tangents[0]] * 2), expected.quadratic(*[tangents[1]] * 2), 1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_custom_layers(device, name):
    if most_precise(device) != torch.float64:
        pytest.skip(f"{device} has no float64, in which these laws hold")
    args, kwargs = moved(ARGUMENTS[name], device)
    check_layer_kind(KINDS[name], *args, **kwargs)


LIKELIHOODS = {
    "categorical": (lrkfac.categorical(), torch.tensor([0, 2, 1, 1])),
    "categorical with options": (
        lrkfac.categorical(ignore_index=1, class_weights=[0.3, 1.7, 0.9], label_smoothing=0.1),
        torch.tensor([0, 2, 1, 1]),
    ),
    "gaussian": (lrkfac.gaussian(0.3), normal(4, 3, seed=1)),
    "gaussian of several variances": (lrkfac.gaussian(torch.tensor([0.1, 1.0, 2.0])), normal(4, 3, seed=1)),
    "bernoulli": (lrkfac.bernoulli(), normal(4, 3, seed=1).sigmoid()),
    "poisson": (lrkfac.poisson(), torch.ones(4, 3)),
}


@pytest.mark.parametrize(("likelihood", "targets"), LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_likelihoods(device, dtype, likelihood, targets):
    check_likelihood(likelihood, *moved((normal(4, 3), targets), device, dtype), samples=2000)
