"""Unmodified modules as libraries write them: every parameter is covered, gradients are right, steps go downhill."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import lrkfac

CLASSES = 3


class BasicBlock(nn.Module):
    """As torchvision writes it: one in-place ReLU for two places, and an in-place sum."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def residual():
    """The stem and two stages of a ResNet."""
    stem = [nn.Conv2d(3, 2, 7, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    shorter = nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
    blocks = [BasicBlock(2, 2), BasicBlock(2, 4, 2, shorter), BasicBlock(4, 4)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(4, CLASSES))


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, left, right):
        left, right = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([left * right, (left - right).abs()], dim=-1))


class CrossAttention(nn.Module):
    """Keys and values of other sizes: three separate projections."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, q, k, v):
        return self.head(self.attention(q, k, v, need_weights=False)[0])


class Cell(nn.Module):
    """A loop over the weights of a cell, as in ``nn.RNNCell``."""

    def __init__(self):
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, CLASSES)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            h = torch.tanh(self.input(step) + self.hidden(h))
        return self.head(h)


def encoder():
    """As it is by default, with dropout, switched off by ``eval()``: where torch has a fast path."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(body, nn.Linear(4, CLASSES)).eval()


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


MODULES = {
    "residual": (residual, lambda: normal(4, 3, 32, 32)),
    "siamese": (Siamese, lambda: (normal(6, 5), normal(6, 5))),
    "cross attention": (CrossAttention, lambda: {"q": normal(4, 2, 4), "k": normal(4, 3, 3), "v": normal(4, 3, 5)}),
    "recurrent cell": (Cell, lambda: normal(4, 3, 3)),
    "TransformerEncoder, eval": (encoder, lambda: normal(4, 3, 4)),
}


# The exact estimator maps the backward pass over columns, and torch maps its fused attention one by one.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("make", "draw"), MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])
def test_every_parameter_is_covered_and_gradients_are_right(make, draw, estimator):
    model, params, buffers = lrkfac.from_module(make().double(), buffers=True)
    params = optree.tree_map(lambda p: p + 0.05 * torch.randn_like(p), params)
    inputs = (buffers, draw())
    outputs = model(params, inputs)[0]
    targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, has_aux=True)(params, inputs, targets)

    def loss(params):
        return F.cross_entropy(model(params, inputs)[0].flatten(0, -2), targets.flatten())

    expected = grad(loss)(params)
    scale = max(g.abs().max() for g in expected.values())
    for name, g in expected.items():
        assert (e.grads[name] - g).abs().max() <= 1e-10 * scale, name
    tx = lrkfac.low_rank_kfac(layers, 0.05, rank=2)
    updates, _ = tx.update(e.grads, tx.init(params), params, evaluation=e)
    assert sum((updates[name] * g).sum() for name, g in expected.items()) < 0
    assert loss(lrkfac.apply_updates(params, updates)) < e.loss
