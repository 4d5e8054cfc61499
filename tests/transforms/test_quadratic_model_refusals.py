"""``scale_by_quadratic_model``: what it refuses, by name."""

import pytest
import torch

import lrkfac
from lrkfac import precondition_by_fisher, scale_by_quadratic_model
from tests import cases
from tests.transforms.test_precondition import layers_and_evaluate

MLP = cases.LINEAR[0]


def test_bad_input():
    layers, evaluate = layers_and_evaluate(MLP)
    pre = precondition_by_fisher(layers)
    with pytest.raises(TypeError, match="preconditioner: expected a GradientTransformation"):
        scale_by_quadratic_model(layers)
    for name, value in {"damping": 0.0, "weight_decay": -1.0, "kl_clip": 0.0, "gradient_decay": 1.0}.items():
        with pytest.raises(ValueError, match=name):
            scale_by_quadratic_model(pre, **{name: value})
    for nothing in (lrkfac.identity(), lrkfac.chain(lrkfac.scale(1.0), lrkfac.trace(0.9))):
        with pytest.raises(ValueError, match="nothing in it preconditions"):
            scale_by_quadratic_model(nothing).init(MLP.params)
    tx = scale_by_quadratic_model(pre)
    state, e = tx.init(MLP.params), evaluate(MLP.params)
    with pytest.raises(TypeError, match="evaluation is missing"):
        tx.update(e.grads, state, MLP.params)
    with pytest.raises(ValueError, match="params is missing"):
        tx.update(e.grads, state, evaluation=e)
    with pytest.raises(ValueError, match="updates beside params: the tree differs"):
        tx.update({}, state, MLP.params, evaluation=e)


def test_an_operation_without_forward_derivative_is_named():
    def model(params, x):
        return torch.cdist(x @ params["w"], x)

    params, x = {"w": torch.randn(3, 3)}, torch.randn(5, 3)
    layers = lrkfac.find_layers(model, params, x)
    f = lrkfac.evaluator(model, lrkfac.gaussian(), layers)
    tx = lrkfac.adaptive_low_rank_kfac(layers)
    e = f(params, x, torch.zeros(5, 5))
    with pytest.raises(NotImplementedError, match=r"no forward derivative.*_cdist_forward"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)
