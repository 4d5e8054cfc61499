"""Models of many styles: every parameter is covered, gradients are autograd's, and a step goes downhill."""

from typing import NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import lrkfac
from examples.resnet import ResNet

CLASSES, VOCABULARY, HEADS = 3, 11, 2


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64) / max(1, shape[-1]) ** 0.5


class Dense(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


# Written out ------------------------------------------------------------------------------------------


def dictionaries():
    """A perceptron of dictionaries and ``@``."""
    sizes = (5, 6, 4, CLASSES)
    params = {f"layer{i}": {"w": normal(*sizes[i : i + 2]), "b": normal(sizes[i + 1])} for i in range(3)}

    def model(params, x):
        for i in range(2):
            x = torch.tanh(x @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"])
        return x @ params["layer2"]["w"] + params["layer2"]["b"]

    return model, params, normal(7, 5)


def einsum():
    """Attention heads as axes of the weights."""
    params = {"q": normal(6, HEADS, 3), "v": normal(HEADS, 3, 6), "o": normal(HEADS, 3, CLASSES)}

    def model(params, x):
        q = torch.einsum("ntd,dhk->nthk", x, params["q"]).tanh()
        v = torch.einsum("hkd,...d->...hk", params["v"], x)
        return torch.einsum("nthk,hkc->ntc", q * v, params["o"]).mean(1)

    return model, params, normal(4, 3, 6)


def columns():
    """``w @ x``, the examples as columns of a matrix for each."""
    params = {"w": normal(6, 5), "head": normal(CLASSES, 6)}

    def model(params, x):
        return (params["head"] @ torch.tanh(params["w"] @ x)).mean(-1)

    return model, params, normal(4, 5, 3)


def nested():
    """NamedTuples, lists and tuples."""
    params = ([Dense(normal(6, 5), normal(6)), (Dense(normal(6, 6), normal(6)),)], {"head": (normal(CLASSES, 6),)})

    def model(params, x):
        (first, (second,)), rest = params
        x = torch.tanh(F.linear(x, first.weight, first.bias))
        x = torch.tanh(F.linear(x, *second))
        return F.linear(x, rest["head"][0])

    return model, params, normal(7, 5)


def recurrent():
    """A loop with the same weights at each step."""
    params = {"h": normal(4, 4), "x": normal(4, 5), "b": normal(4), "out": Dense(normal(CLASSES, 4), normal(CLASSES))}

    def model(params, x):
        h = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = torch.tanh(F.linear(x[:, t], params["x"], params["b"]) + F.linear(h, params["h"]))
        return F.linear(h, *params["out"])

    return model, params, normal(4, 3, 5)


def tied():
    """Embedding and output layer share their weight."""
    params = {"table": normal(VOCABULARY, 4), "mix": Dense(normal(4, 4), normal(4))}

    def model(params, tokens):
        x = F.embedding(tokens, params["table"])
        x = torch.tanh(F.linear(x, *params["mix"])).cumsum(1)
        return F.linear(x, params["table"])

    return model, params, torch.randint(VOCABULARY, (4, 3))


def vision_transformer():
    """Patches, a class token, positions, one block of attention and a perceptron."""
    d, hidden = 6, 8
    params = {
        "patch": Dense(normal(d, 2, 2, 2), normal(d)), "cls": normal(1, 1, d), "position": normal(1, 5, d),
        "norm1": Dense(1 + normal(d), normal(d)), "qkv": Dense(normal(3 * d, d), normal(3 * d)),
        "out": Dense(normal(d, d), normal(d)), "norm2": Dense(1 + normal(d), normal(d)),
        "up": Dense(normal(hidden, d), normal(hidden)), "down": Dense(normal(d, hidden), normal(d)),
        "head": Dense(normal(CLASSES, d), normal(CLASSES)),
    }  # fmt: skip

    def model(params, images):
        x = F.conv2d(images, *params["patch"], stride=2).flatten(2).mT
        x = torch.cat([params["cls"].expand(x.shape[0], -1, -1), x], dim=1) + params["position"]
        y = F.linear(F.layer_norm(x, (d,), *params["norm1"]), *params["qkv"])
        q, k, v = y.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.mT, dim=-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), *params["out"])
        y = F.gelu(F.linear(F.layer_norm(x, (d,), *params["norm2"]), *params["up"]))
        return F.linear((x + F.linear(y, *params["down"]))[:, 0], *params["head"])

    return model, params, normal(3, 2, 4, 4)


def dictionary_inputs():
    """Inputs of two kinds."""
    params = {"image": Dense(normal(4, 5), normal(4)), "word": normal(VOCABULARY, 4), "head": normal(CLASSES, 4)}

    def model(params, inputs):
        x = F.linear(inputs["image"], *params["image"]) + F.embedding(inputs["word"], params["word"])
        return F.linear(torch.tanh(x), params["head"])

    return model, params, {"image": normal(5, 5), "word": torch.randint(VOCABULARY, (5,))}


def low_rank_adaptation():
    """A constant weight and a trained correction of low rank."""
    constant = normal(5, 6)
    params = {"a": normal(5, 2), "b": normal(2, 6), "head": normal(6, CLASSES)}

    def model(params, x):
        return torch.tanh(x @ constant + 0.5 * (x @ params["a"] @ params["b"])) @ params["head"]

    return model, params, normal(7, 5)


def views():
    """Transposes, reshapes, chunks and slices of the parameters."""
    params = {
        "t": normal(5, 6), "flat": normal(36), "packed": Dense(normal(12, 6), normal(12)), "sliced": normal(8, 6),
        "head": normal(6, CLASSES),
    }  # fmt: skip

    def model(params, x):
        x = torch.tanh(F.linear(x, params["t"].T))
        x = torch.tanh(x @ params["flat"].reshape(6, 6))
        parts = zip(params["packed"].weight.chunk(2), params["packed"].bias.chunk(2), strict=True)
        x, gate = (F.linear(x, w, b) for w, b in parts)
        y = torch.cat([F.linear(x, params["sliced"][:3]), F.linear(gate, params["sliced"][3:6])], dim=-1)
        return (y * F.linear(x, params["sliced"][6:]).sum(-1, keepdim=True)) @ params["head"]

    return model, params, normal(7, 5)


# Modules ----------------------------------------------------------------------------------------------


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.down = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 2, stride=2)
        self.middle, self.up = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.leave, self.grouped = nn.Conv2d(6, CLASSES, 1), nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        y = torch.tanh(self.grouped(torch.tanh(self.middle(torch.tanh(self.down(x))))))
        return self.leave(torch.cat([x, torch.tanh(self.up(y))], dim=1)).movedim(1, -1)


class Norms(nn.Module):
    """Convolutions over one or three axes with norms of all kinds."""

    def __init__(self, axes):
        super().__init__()
        convolution = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
        instance = {1: nn.InstanceNorm1d, 3: nn.InstanceNorm3d}[axes]
        self.first, self.second = convolution(2, 4, 2), convolution(4, 4, 2, groups=2, bias=False)
        self.group, self.instance = nn.GroupNorm(2, 4), instance(4, affine=True)
        self.rms, self.head = nn.RMSNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.group(self.first(x)))
        x = torch.tanh(self.instance(self.second(x))).flatten(2).mT
        return self.head(self.rms(x).square().mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, HEADS, 6, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same", groups=3), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Tanh(), nn.Flatten(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


def of_module(make, *shape):
    def build():
        model, params = lrkfac.from_module(make().double())
        # Scales that are all 1 and shifts that are all 0 would hide errors.
        return model, optree.tree_map(lambda p: p + 0.1 * torch.randn_like(p), params), normal(*shape)

    return build


def residual():
    """With BatchNorm as in training, its running averages beside the images."""
    model, params, buffers = lrkfac.from_module(ResNet(widths=(3, 4)).double(), buffers=True)
    return model, params, (buffers, normal(3, 3, 6, 6))


MODELS = {
    **{f.__name__: f for f in (
        dictionaries, einsum, columns, nested, recurrent, tied, vision_transformer, dictionary_inputs,
        low_rank_adaptation, views, residual,
    )},
    "unet": of_module(UNet, 2, 2, 4, 4), "conv1d": of_module(lambda: Norms(1), 4, 2, 6),
    "conv3d": of_module(lambda: Norms(3), 4, 2, 4, 3, 4), "transformer": of_module(Encoder, 4, 3, 4),
    "depthwise": of_module(depthwise, 4, 3, 4, 4),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    """The model, parameters, inputs, targets and whether it returns more than outputs."""
    model, params, inputs = MODELS[name]()
    outputs = model(params, inputs)
    has_aux = isinstance(outputs, tuple)
    outputs = outputs[0] if has_aux else outputs
    return model, params, inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1]), has_aux


# The exact estimator maps the backward pass over columns, and torch maps its fused attention one by one.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_model
@pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])
def test_every_parameter_is_covered_and_gradients_are_right(name, estimator):
    model, params, inputs, targets, has_aux = make(name)
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, has_aux=has_aux)(params, inputs, targets)

    def loss(params):
        outputs = model(params, inputs)
        outputs = outputs[0] if has_aux else outputs
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    torch.testing.assert_close(e.loss, loss(params))
    leaves = zip(optree.tree_leaves(e.grads), optree.tree_leaves(grad(loss)(params)), strict=True)
    scale = max(g.abs().max() for g in optree.tree_leaves(e.grads))
    for parameter, (found, expected) in zip(layers.parameters, leaves, strict=True):
        assert (found - expected).abs().max() <= 1e-10 * scale, parameter.path


@each_model
def test_a_step_goes_downhill(name):
    model, params, inputs, targets, has_aux = make(name)
    layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, has_aux=has_aux)
    tx = lrkfac.low_rank_kfac(layers, 0.05, rank=2)
    e = evaluate(params, inputs, targets)
    updates, _ = tx.update(e.grads, tx.init(params), params, evaluation=e)
    changes, grads = optree.tree_leaves(updates), optree.tree_leaves(e.grads)
    assert all(bool(change.isfinite().all()) for change in changes)
    assert sum((u * g).sum() for u, g in zip(changes, grads, strict=True)) < 0
    assert e.loss_at(lrkfac.apply_updates(params, updates)) < e.loss
