"""What belongs to a layer and what does not: the description, and gradients that are autograd's either way."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, vmap

import lrkfac
from lrkfac import evaluator, find_layers
from tests.tensors import close, normal

X = normal(5, 4, seed=9)
P = {"w": normal(4, 4), "v": normal(4, 4, seed=1), "b": normal(4, seed=2), "c": normal(4, seed=3)}


def gradients_are_those_of_autograd(model, params, inputs, **options):
    """With and without statistics, and products with the Gauss-Newton matrix; returns the layers."""
    layers, outputs = find_layers(model, params, inputs, **options), model(params, inputs)
    targets, u = normal(*outputs.shape, seed=7), {k: normal(*p.shape, seed=3) for k, p in params.items()}
    expected = grad(lambda p: ((model(p, inputs) - targets) ** 2).flatten(1).sum(1).mean() / 2)(params)
    jacobian = jacrev(lambda p: model(p, inputs).flatten())(params)
    along = sum(jacobian[k].flatten(1) @ u[k].flatten() for k in u)
    product = {k: torch.tensordot(along, jacobian[k], 1) / len(outputs) for k in u}
    evaluate = evaluator(model, lrkfac.gaussian(), layers, "exact")
    for statistics in (True, False):
        e = evaluate(params, inputs, targets, statistics=statistics)
        close((e.grads, e.product(u)), (expected, product))
    return layers


def linear(p, x, bias="b"):
    return F.linear(x, p["w"], p[bias])


COVERED = {
    "x @ w + b": (lambda p, x: x @ p["w"] + p["b"], ["w linear w, b"]),
    "b + w @ x": (lambda p, x: p["w"] @ x.mT, ["w linear"]),
    "matmul of a turned weight": (lambda p, x: torch.matmul(x, p["w"].mT) + p["b"], ["w linear w, b"]),
    "on sequences": (lambda p, x: torch.matmul(torch.stack([x, x.cos()], 1), p["w"]) + p["b"], ["w linear w, b"]),
    "mm and add by name": (
        lambda p, x: torch.add(input=torch.mm(input=x, mat2=p["w"]), other=p["b"]), ["w linear w, b"],
    ),
    "addmm by name": (lambda p, x: torch.addmm(input=p["b"], mat1=x, mat2=p["w"]), ["w linear w, b"]),
    "heads": (lambda p, x: x @ p["w"].view(4, 2, 2).transpose(1, 2).reshape(4, 4) + p["b"], ["w linear w, b"]),
    "conv1d, uneven and grouped": (
        lambda p, x: F.conv1d(x.view(5, 2, 2), p["w"].view(4, 1, 4), p["b"], padding="same", groups=2),
        ["w conv1d w, b"],
    ),
    "multiplied by name": (lambda p, x: torch.mul(input=linear(p, x), other=p["c"]), ["w linear w, b", "c scale"]),
    "repeated": (
        lambda p, x: linear(p, torch.cat([p["c"].expand(len(x), 1, 4), x[:, None]], 1)).tanh().mean(1),
        ["c shift", "w linear w, b"],
    ),
    "added to the input": (lambda p, x: linear(p, x + p["c"]), ["c shift", "w linear w, b"]),
    "halves": (
        lambda p, x: torch.cat([F.linear(x, w, b) for w, b in zip(p["w"].chunk(2), p["b"].chunk(2), strict=True)], 1),
        ["w.chunk(2)[0] linear w, b", "w.chunk(2)[1] linear w, b"],
    ),
    "slices": (
        lambda p, x: x @ p["w"][:, :1] + x @ p["w"][:, 1:2] * (x @ p["w"][:, 2:]),
        [f"w[(slice(None, None, None), slice({part}, None))] linear" for part in ("None, 1", "1, 2", "2, None")],
    ),
    "view of a product used without its bias": (
        lambda p, x: (lambda h: (h + p["b"]) * h.flip(1).view(5, 4))(x @ p["w"]), ["w linear", "b shift"],
    ),
    "tied": (lambda p, x: F.linear(F.embedding((x > 0).sum(1) % 4, p["w"]).tanh(), p["w"]), ["w embedding + linear"]),
    "an equal tensor is another": (lambda p, x: F.linear(F.linear(x, P["w"]), p["w"]), ["w linear"]),
    "recurrent": (lambda p, x: linear(p, linear(p, linear(p, x).tanh_() + x).mul_(2)).mul_(2), ["w linear w, b"]),
    "inside vmap and outside": (
        lambda p, x: linear(p, vmap(lambda row: linear(p, row))(x).tanh()), ["w linear w, b"],
    ),
    "side by side": (lambda p, x: linear(p, x) * linear(p, x.flip(1)), ["w linear w, b"]),
    "other numbers of rows": (lambda p, x: linear(p, linear(p, torch.stack([x, x + 1], 1)).prod(1)), ["w linear w, b"]),
    "tied and not": (lambda p, x: (x @ p["w"]).tanh() @ p["w"] @ p["v"], ["w linear", "v linear"]),
}  # fmt: skip


@pytest.mark.parametrize(("model", "expected"), COVERED.values(), ids=COVERED.keys())
def test_covered(model, expected):
    layers = gradients_are_those_of_autograd(model, P, X)
    bias = lambda layer: "" if layer.bias is None else f" {layer.weight.path}, {layer.bias.path}"  # noqa: E731
    assert [f"{layer.name} {layer.kind}{bias(layer)}" for layer in layers] == expected
    assert all(reason == "not used by the model" for _, reason in layers.uncovered)
    gradients_are_those_of_autograd(model, P, X, bias="separate")


def test_convolution_used_with_different_settings():
    def model(p, x):
        for settings in ({"stride": 2}, {"padding": "same"}, {"dilation": 2}):
            x = F.conv2d(x, p["w"], p["b"], groups=2, **settings)
        return x

    params = {"w": normal(4, 2, 2, 2), "b": normal(4)}
    (layer,) = gradients_are_those_of_autograd(model, params, normal(2, 4, 8, 9))
    assert (layer.uses, layer.bias.path) == (3, "b") and [o[1] for o in layer.options] == [(2, 2), (1, 1), (1, 1)]


SHARED_BIASES = {
    "bias and scale": lambda p, x: linear(p, x) * p["b"],
    "bias in one use of two, and scale": lambda p, x: F.linear(linear(p, x).tanh() * p["b"], p["w"]),
    "bias of two weights, and scale": lambda p, x: F.linear(linear(p, x).tanh(), p["v"], p["b"]) * p["b"],
    "bias and weight": lambda p, x: F.linear(linear(p, x), p["b"][None]),
    "bias and shift": lambda p, x: linear(p, (x + p["b"]).tanh()),
    "shift before and after": lambda p, x: F.linear((x + p["b"]).tanh(), p["w"]) + p["b"],
    "two arrangements": lambda p, x: F.linear(linear(p, x).tanh(), p["v"], p["b"].view(4)),
    "overlapping parts": lambda p, x: (
        F.linear(x, p["w"][:3], p["b"][:3]).sum(1, True) * F.linear(x, p["w"][3:], p["b"][2:3])
    ),
    "bias of a layer and of an uncovered norm": lambda p, x: linear(p, F.layer_norm(x, (4,), p["v"][0], p["b"])),
    "half of it with an uncovered weight": lambda p, x: (
        F.linear(x, p["w"][:2], p["b"][:2]) * F.linear(x, p["v"][2:], p["b"][2:]) + F.linear(x, p["w"][2:])
    ),
    "scale and shift of one norm": lambda p, x: F.linear(F.layer_norm(x, (4,), p["b"], p["b"]), p["w"]),
}


SEPARATE_BIASES = {
    "bias in one use of two": lambda p, x: F.linear(linear(p, x).relu_(), p["w"]),
    "bias of two weights": lambda p, x: F.linear(linear(p, x).tanh(), p["v"], p["b"]),
    "one of several biases": lambda p, x: F.linear(linear(p, linear(p, x, "c")), p["v"], p["b"]),
}


@pytest.mark.parametrize("model", SEPARATE_BIASES.values(), ids=SEPARATE_BIASES)
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_bias_of_some_uses_or_of_several_weights_is_a_layer(model, bias):
    layers = gradients_are_those_of_autograd(model, P, X, bias=bias)
    assert layers["b"].kind == "bias" and not {"b", "c"} & {
        p.path for p, reason in layers.uncovered if "bias" in reason
    }


@pytest.mark.parametrize("model", SHARED_BIASES.values(), ids=SHARED_BIASES.keys())
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_bias_with_other_uses_belongs_to_no_layer(model, bias):
    layers = gradients_are_those_of_autograd(model, P, X, bias=bias)
    reasons = {p.path: reason for p, reason in layers.uncovered}
    assert "bias" in reasons["b"] and layers.covered


def test_one_tensor_at_two_places_is_two_parameters_and_a_weight_with_a_bias_in_it_none():
    model = lambda p, x: F.linear(F.linear(x, p["first"]).tanh(), p["last"])  # noqa: E731
    assert len(gradients_are_those_of_autograd(model, {"first": P["w"], "last": P["w"]}, X)) == 2
    layers = gradients_are_those_of_autograd(lambda p, x: F.linear(x, p["w"], p["v"][0]) @ p["v"], P, X)
    assert [layer.name for layer in layers] == ["w"]
