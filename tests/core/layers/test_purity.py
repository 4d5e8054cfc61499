"""What a model must not do to its arguments or behind torch's back, and what it may: then all is as by autograd."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lrkfac import find_layers
from tests.core.layers.test_coverage import P as ALL
from tests.core.layers.test_coverage import X, gradients_are_those_of_autograd, linear

P = {name: ALL[name] for name in "bvw"}


def last(p, x):
    return F.linear(x, p["v"])


def without_gradient(function):
    """A model with a part to which the gradient does not come."""

    def model(p, x):
        h = linear(p, x)
        with torch.no_grad():
            part = function(p, h)
        return last(p, h.tanh()) + part

    return model


def frozen_view(p, x):
    """The gradient stops at the view, not at the product."""
    with torch.no_grad():
        w = p["w"].T
    return x @ w


def changed(change):
    def model(p, x):
        change(p, x)
        return linear(p, x)

    return model


BUFFER, NORM = torch.zeros(4, dtype=torch.float64), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
NO_GRAD = "is called under no_grad on what depends on"
VALUES = "depend on the values of tensors"
REFUSED = {
    "parameter under no_grad": (without_gradient(last), f"functional.linear {NO_GRAD} the parameter 'v'; detach"),
    "bias under no_grad": (without_gradient(lambda p, h: p["b"] * 2), f"mul {NO_GRAD} the parameter 'b'"),
    "view under no_grad": (frozen_view, f"Tensor.T.__get__ {NO_GRAD} the parameter 'w'"),
    "activation under no_grad": (without_gradient(lambda p, h: h.mean()), f"Tensor.mean {NO_GRAD} parameters"),
    "parameter in inference mode": (
        lambda p, x: linear(p, x) + torch.inference_mode()(lambda: p["w"].sum())(), f"sum {NO_GRAD} the parameter 'w'"),
    "parameter changed": (changed(lambda p, x: p["w"].mul_(2)), "it changes params 'w' in place"),
    "part of a parameter changed": (changed(lambda p, x: p["b"][:2].zero_()), "it changes params 'b' in place"),
    "input changed": (changed(lambda p, x: x.mul_(2)), "it changes inputs in place"),
    "output of a layer changed after the next": (
        lambda p, x: (lambda h: last(p, h) + h.relu_())(linear(p, x)), "layer 'v': its input is changed in place"),
    "view of the input of a layer changed": (
        lambda p, x: linear(p, h := x + 1) + h[0].relu_(), "layer 'w': its input is changed in place"),
    "batch norm": (lambda p, x: linear(p, functional_call(NORM, {}, (x,))), "add_.*use from_module"),
    "functional batch norm": (
        lambda p, x: F.batch_norm(linear(p, x), BUFFER, BUFFER, training=True), "batch_norm changes a tensor"),
    "buffer += 1": (changed(lambda p, x: BUFFER.__iadd__(1)), r"add__? changes a tensor of shape \(4,\)"),
    "buffer[0] = 1": (changed(lambda p, x: BUFFER.__setitem__(0, 1)), "__setitem__ changes a tensor"),
    "dropout": (lambda p, x: F.dropout(linear(p, x), 0.1), "functional.dropout draws hidden random numbers"),
    "attention's dropout": (
        lambda p, x: linear(p, F.scaled_dot_product_attention(x[None], x[None], x[None], None, 0.1)[0]),
        "scaled_dot_product_attention draws hidden random numbers"),
    "noise": (lambda p, x: linear(p, x + torch.randn_like(x)), "draws hidden random numbers"),
    "shape by values": (lambda p, x: linear(p, x[x[:, 0] > 0]), VALUES),
    "no parameter": (lambda p, x: linear(p, x).detach(), "outputs depend on no parameter"),
    "item": (lambda p, x: linear(p, x) * x.sum().item(), VALUES),
    "numpy": (lambda p, x: linear(p, x) * float(x.numpy().sum()), "Tensor.numpy reads the values of a tensor"),
    "value of a parameter": (lambda p, x: linear(p, x) if p["w"].sum() > 0 else x, VALUES),
}  # fmt: skip


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_changes(model, message):
    params, x = optree.tree_map(torch.clone, (P, X))
    with pytest.raises(ValueError, match=message):
        find_layers(model, params, x)
    assert torch.equal(x, X) and optree.tree_all(optree.tree_map(torch.equal, params, P))
    assert not BUFFER.any() and NORM[1].num_batches_tracked == 0 and not NORM[1].running_mean.any()


def test_input_of_a_tree_that_is_changed_is_named():
    with pytest.raises(ValueError, match=r"model: it changes inputs 'images\.0' in place.*clone"):
        find_layers(lambda p, i: linear(p, i["images"][0].mul_(2)), P, {"images": [X], "mask": X})


ACCEPTED = {
    "detached weight": (lambda p, x: F.linear(last(p, x), p["w"].detach(), p["b"]), {"w": "Tensor.detach"}),
    "data of a weight": (lambda p, x: F.linear(last(p, x), p["w"].data), {"w": "Tensor.data", "b": "not used"}),
    "detached activation": (lambda p, x: last(p, linear(p, x).detach().tanh()), {}),
    "detached in one use of two": (lambda p, x: last(p, linear(p, x).tanh()) * linear(p, x).detach(), {}),
    "detached input": (lambda p, x: last(p, linear(p, linear(p, x).tanh().detach())), {}),
    "straight-through estimator": (lambda p, x: (lambda h: last(p, h + (h.sign() - h).detach()))(linear(p, x)), {}),
    "constants under no_grad": (
        lambda p, x: last(p, linear(p, x)) + torch.no_grad()(lambda h: x.mean() + h.shape[0])(linear(p, x)), {}),
    "padding of an embedding that is tied": (
        lambda p, x: F.linear(last(p, F.embedding((x > 0).sum(1) % 4, p["w"], padding_idx=2).tanh()), p["w"], p["b"]),
        {}),
    "new tensor changed": (lambda p, x: last(p, linear(p, torch.zeros_like(x).add_(x))), {}),
    "dropout switched off": (lambda p, x: last(p, F.dropout(F.dropout(linear(p, x), training=False), 0.0)), {}),
    "batch norm with fixed statistics": (lambda p, x: last(p, F.batch_norm(linear(p, x), BUFFER, BUFFER + 1)), {}),
    "activations in place": (lambda p, x: last(p, linear(p, x).mul_(2).relu_()).tanh_(), {}),
    "copies changed in place": (lambda p, x: last(p, linear(p, x.clone().relu_())) * p["b"].clone().exp_(), {"b": ""}),
}  # fmt: skip


@pytest.mark.parametrize(("model", "uncovered"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_stops_the_gradient_is_as_by_autograd(model, uncovered):
    layers = gradients_are_those_of_autograd(model, P, X)
    reasons = {p.path: reason for p, reason in layers.uncovered}
    assert set(reasons) == set(uncovered) and all(uncovered[path] in reasons[path] for path in reasons)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert find_layers(model, P, X) == layers
