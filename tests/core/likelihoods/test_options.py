"""Dtypes and options of the families, and targets that make no sense; their losses: ``test_protocol.py``."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from lrkfac import bernoulli, categorical, evaluator, find_layers, gaussian, poisson
from tests.tensors import close, normal


def test_targets_of_other_dtypes():
    """Small integers hold class numbers, also where the number to ignore does not fit; labels may be bools."""
    outputs, numbers = normal(4, 3), torch.tensor([0, 2, 1, 0], dtype=torch.uint8)
    close(categorical(ignore_index=-100).loss(outputs, numbers), F.cross_entropy(outputs, numbers.long()))
    for likelihood, targets in ((bernoulli(), outputs > 0), (poisson(), numbers[:, None].expand(4, 3))):
        likelihood.check(outputs, targets)
        close(likelihood.loss(outputs, targets), likelihood.loss(outputs, targets.double()))


@pytest.mark.parametrize("likelihood", [categorical(), gaussian(0.25), bernoulli(), poisson()], ids=lambda x: x.name)
def test_half_precision_is_rounded_once(likelihood):
    """Roots and products are computed in float32."""
    outputs, z = normal(50, 30).bfloat16(), normal(50, 30, seed=1).bfloat16()
    for method in (likelihood.square_root, likelihood.hessian_product):
        found, expected = method(outputs, z), method(outputs.double(), z.double())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_variances_per_output():
    """As if each output were divided by its deviation."""
    variance, outputs, targets = torch.tensor([0.25, 4.0, 1.0]), torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    scaled = gaussian().loss(outputs / variance.sqrt(), targets / variance.sqrt())
    close(gaussian(variance).loss(outputs, targets), scaled, 1e-6)
    for shape in ((), (1,), (3,), (2, 1), (2, 3)):
        gaussian(torch.ones(shape)).check(outputs, targets)
    for shape in ((2,), (5, 2, 3), (1, 2, 3), (3, 1)):
        with pytest.raises(ValueError, match=r"variance: expected a shape that broadcasts against \(2, 3\)"):
            gaussian(torch.ones(shape)).check(outputs, targets)


def test_noise_gives_quantiles_of_counts():
    u = torch.tensor([0.0, 0.49, 0.5, 0.99], dtype=torch.float64)[:, None]
    drawn = poisson().sample(torch.full((4, 1), math.log(9.0), dtype=torch.float64), u)
    close(drawn.flatten(), torch.tensor([6.0, 6.0, 12.0, 12.0], dtype=torch.float64))


def linear(params, inputs):
    return F.linear(inputs, params["w"])


def test_values_are_looked_at_where_they_are_known():
    """In eager mode, within ``grad`` too; not under ``vmap`` over targets, where the loss is not finite instead."""
    ignoring, outputs = categorical(ignore_index=-100), torch.zeros(2, 3)
    none_left = torch.full((2,), -100)
    cases = {
        "class numbers from 0 to 2, got 3; .*ignore_index=3": (categorical(), torch.tensor([0, 3])),
        "class numbers from 0 to 2, got -100; .*ignore_index=-100": (categorical(), none_left),
        "class numbers from 0 to 2, got -1; .*ignore_index=-1": (ignoring, torch.tensor([-100, -1])),
        "one counts, got a batch in which all are ignored": (ignoring, none_left),
        "or of a class of weight 0": (categorical(class_weights=[0, 1, 1]), torch.tensor([0, 0])),
    }
    for message, (likelihood, targets) in cases.items():
        loss = lambda f, k=likelihood, y=targets: k.loss(f, y)  # noqa: E731
        for run, batch in ((loss, outputs), (grad(loss), outputs), (vmap(grad(loss)), outputs[None])):
            with pytest.raises(ValueError, match=f"categorical: expected targets .*{message}"):
                run(batch)
        params = {"w": torch.zeros(3, 3)}
        f = evaluator(linear, likelihood, find_layers(linear, params, outputs))
        for statistics in (False, True):
            with pytest.raises(ValueError, match=f"categorical: expected targets .*{message}"):
                f(params, outputs, targets, statistics=statistics)
    losses = vmap(ignoring.loss, (None, 0))(outputs, torch.stack([none_left, torch.tensor([0, -100])]))
    assert losses[0].isnan() and losses[1].isfinite()
