"""Models of many styles: every parameter is covered, gradients are autograd's, and a step goes downhill.

Spellings of layers and trees of parameters are drawn in ``tests/test_architectures.py``.
"""

from functools import cache
from typing import NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import lrkfac

CLASSES, VOCABULARY = 3, 11


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64) / max(1, shape[-1]) ** 0.5


class Dense(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


# Written out ------------------------------------------------------------------------------------------


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


# Modules ----------------------------------------------------------------------------------------------


class Norms(nn.Module):
    """Convolutions with norms of all kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 2), nn.Conv1d(4, 4, 2, groups=2, bias=False)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)
        self.rms, self.head = nn.RMSNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.group(self.first(x)))
        x = torch.tanh(self.instance(self.second(x))).flatten(2).mT
        return self.head(self.rms(x).square().mean(1))


class Residual(nn.Module):
    """With BatchNorm, one in-place ReLU for two places, and an in-place sum."""

    def __init__(self, d_in, d_out, stride):
        super().__init__()
        self.relu, self.shorter = nn.ReLU(inplace=True), nn.Conv2d(d_in, d_out, 1, stride, bias=False)
        first, last = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.Conv2d(d_out, d_out, 3, 1, 1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(d_out), self.relu, last, nn.BatchNorm2d(d_out))

    def forward(self, x):
        out = self.body(x)
        out += self.shorter(x)
        return self.relu(out)


class CrossAttention(nn.Module):
    """Keys and values of other sizes: three separate projections."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, q, k, v):
        return self.head(self.attention(q, k, v, need_weights=False)[0])


def encoder():
    """As it is by default, with dropout, switched off by ``eval()``: where torch has a fast path."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(body, nn.Linear(4, CLASSES)).eval()


def of_module(make, draw):
    def build():
        model, params = lrkfac.from_module(make().double())
        # Scales that are all 1 and shifts that are all 0 would hide errors.
        return model, optree.tree_map(lambda p: p + 0.1 * torch.randn_like(p), params), draw()

    return build


def residual():
    """With BatchNorm as in training, its running averages beside the images."""
    stem = [nn.Conv2d(3, 2, 5, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    net = nn.Sequential(*stem, Residual(2, 4, 2), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(4, CLASSES))
    model, params, buffers = lrkfac.from_module(net.double(), buffers=True)
    return model, optree.tree_map(lambda p: p + 0.05 * torch.randn_like(p), params), (buffers, normal(4, 3, 16, 16))


MODELS = {
    **{f.__name__: f for f in (recurrent, tied, residual)},
    "conv1d": of_module(Norms, lambda: normal(4, 2, 6)),
    "transformer": of_module(encoder, lambda: normal(4, 3, 4)),
    "cross attention": of_module(CrossAttention, lambda: (normal(4, 2, 4), normal(4, 3, 3), normal(4, 3, 5))),
}


@cache
def make(name):
    """The model, parameters, inputs, targets and whether it returns more than outputs; drawn once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, params, inputs = MODELS[name]()
        outputs = model(params, inputs)
        has_aux = isinstance(outputs, tuple)
        outputs = outputs[0] if has_aux else outputs
        return model, params, inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1]), has_aux


@cache
def layers_of(name):
    return lrkfac.find_layers(*make(name)[:3], strict=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])
def test_every_parameter_is_covered_gradients_are_right_and_a_step_goes_downhill(name, estimator):
    model, params, inputs, targets, has_aux = make(name)
    layers = layers_of(name)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, has_aux=has_aux)(params, inputs, targets)

    def loss(params):
        outputs = model(params, inputs)
        outputs = outputs[0] if has_aux else outputs
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    torch.testing.assert_close(e.loss, loss(params))
    grads = optree.tree_leaves(e.grads)
    leaves, scale = zip(grads, optree.tree_leaves(grad(loss)(params)), strict=True), max(g.abs().max() for g in grads)
    for parameter, (found, expected) in zip(layers.parameters, leaves, strict=True):
        assert (found - expected).abs().max() <= 1e-10 * scale, parameter.path
    tx = lrkfac.low_rank_kfac(layers, 0.05, rank=2)
    updates, _ = tx.update(e.grads, tx.init(params), params, evaluation=e)
    changes = optree.tree_leaves(updates)
    assert all(bool(change.isfinite().all()) for change in changes)
    assert sum((u * g).sum() for u, g in zip(changes, grads, strict=True)) < 0
    assert e.loss_at(lrkfac.apply_updates(params, updates)) < e.loss
