"""Factors of every way to write a layer, against rows that plain torch gives by applying the operation to units."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch.func import jacrev, vmap

import lrkfac
from lrkfac import evaluator, find_layers
from lrkfac.core.curvature import covariances
from lrkfac.core.layers.matrix import split_groups

N = 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plus(s, b):
    return s if b is None else s + b


def convolution(axes, groups=1, kernel=2, channels=4, out=4, mode=None, **settings):
    """``(operation, inputs, shape of the matrix, from the matrix to the weight, groups, channel axis)``."""
    function, sizes = getattr(F, f"conv{axes}d"), (6, 5, 4)[:axes]
    shape = (out, channels // groups, *[kernel] * axes)

    def operation(x, w, b):
        x = x if mode is None else F.pad(x, [1, 1] * axes, mode)
        return function(x, w, b, groups=groups, **settings)

    return operation, normal(N, channels, *sizes), (out, prod(shape[1:])), lambda m: m.reshape(shape), groups, 1


def transposed(axes, groups=1, channels=4, out=2, **settings):
    function, sizes, kernel = getattr(F, f"conv_transpose{axes}d"), (4, 3, 2)[:axes], [2] * axes
    inner = channels // groups

    def weight(m):
        return m.reshape(groups, out, inner, *kernel).transpose(1, 2).reshape(channels, out, *kernel)

    def operation(x, w, b):
        return function(x, w, b, groups=groups, **settings)

    return operation, normal(N, channels, *sizes), (groups * out, inner * 2**axes), weight, groups, 1


def product(operation, *shape, weight=lambda m: m, d=4, k=3):
    return operation, normal(N, *(shape or (d,))), (k, d), weight, 1, -1


def turned(m):
    return m.T.contiguous()


SPELLINGS = {
    "linear": product(F.linear),
    "linear on sequences": product(F.linear, 2, 4),
    "x @ w + b": product(lambda x, w, b: plus(x @ w, b), weight=turned),
    "matmul": product(lambda x, w, b: plus(torch.matmul(x, w), b), 2, 4, weight=turned),
    "mm": product(lambda x, w, b: plus(x.mm(w), b), weight=turned),
    "addmm": product(lambda x, w, b: x.mm(w) if b is None else torch.addmm(b, x, w), weight=turned),
    "einsum": product(lambda x, w, b: plus(torch.einsum("ntd,dk->ntk", x, w), b), 2, 4, weight=turned),
    "w.T": product(lambda x, w, b: plus(x @ w.T, b)),
    "matmul and add by name": product(
        lambda x, w, b: (lambda s: s if b is None else torch.add(input=s, other=b))(torch.matmul(input=x, other=w)),
        weight=turned,
    ),
    "mm by name": product(lambda x, w, b: plus(torch.mm(input=x, mat2=w), b), weight=turned),
    "addmm by name": product(
        lambda x, w, b: x.mm(mat2=w) if b is None else torch.addmm(input=b, mat1=x, mat2=w), weight=turned
    ),
    "linear with a turned weight": product(lambda x, w, b: F.linear(x, w.t(), b), weight=turned),
    "[d_in, heads, d_head] weights": product(
        lambda x, w, b: plus(x @ w.reshape(4, 6), b), weight=lambda m: m.T.reshape(4, 2, 3), k=6
    ),
    "conv1d": convolution(1),
    "conv2d, same": convolution(2, kernel=3, padding="same"),
    "conv2d, groups": convolution(2, groups=2, padding=1),
    "conv2d, depthwise": convolution(2, groups=4, out=8),
    "conv3d": convolution(3, stride=2, padding=1, channels=2, out=2),
    **{f"conv2d, {mode}": convolution(2, kernel=3, mode=mode) for mode in ("circular", "reflect", "replicate")},
    "@ with a turned and reshaped weight": product(
        lambda x, w, b: plus(x @ w.transpose(1, 2).reshape(4, 6), b),
        weight=lambda m: m.T.reshape(4, 2, 3).transpose(1, 2).contiguous(),
        k=6,
    ),
    "conv_transpose1d": transposed(1, stride=2, output_padding=1),
    "conv_transpose2d, groups": transposed(2, groups=2, stride=(2, 1), padding=1),
    "conv_transpose3d": transposed(3, channels=2),
}


def rows(operation, x, shape, weight, groups, channel, bias):
    """``[groups, R, d_in]``: what the operation returns for weights with one entry, from its linearity alone."""
    d_out, d_in = shape[0] // groups, shape[1]
    found = []
    for i in range(groups):
        columns = []
        for j in range(d_in):
            unit = torch.zeros(shape, dtype=torch.float64)
            unit[i * d_out, j] = 1
            columns.append(operation(x, weight(unit), None).select(channel, i * d_out).flatten())
        found.append(torch.stack([*columns, torch.ones_like(columns[0])][: d_in + bias], dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_factors_are_second_moments_of_rows(name, bias):
    operation, x, shape, weight, groups, channel = SPELLINGS[name]
    params = {"w": weight(normal(*shape, seed=1)), **({"b": normal(shape[0], seed=2)} if bias else {})}
    s = operation(x, params["w"], params.get("b"))
    head = normal(s[0].numel(), 3, seed=3) / s[0].numel() ** 0.5
    model = lambda p, x: torch.tanh(operation(x, p["w"], p.get("b"))).flatten(1) @ head  # noqa: E731
    layers = find_layers(model, params, x, strict=True)
    layer = layers["w"]
    bias = bias and name != "einsum"  # whose bias is a layer of its own, a shift
    assert (layer.groups, layer.bias is not None) == (groups, bias)
    e = evaluator(model, lrkfac.gaussian(), layers, "exact")(params, x, normal(N, 3, seed=4))
    parts = [split_groups(layer, part[layer.name]) for part in e.statistics[:2]]

    def dense(inputs, gradients):
        found = covariances.factors(layer, inputs, gradients, e.statistics.scale)
        return found.input.dense(), found.output.dense()

    A, B = vmap(dense)(*parts) if groups > 1 else (m[None] for m in dense(*parts))
    a = rows(operation, x, shape, weight, groups, channel, bias)
    torch.testing.assert_close(A, a.mT @ a / a.shape[1])
    g = vmap(jacrev(lambda s: torch.tanh(s).flatten() @ head))(s).movedim(2 if channel == 1 else -1, -1)
    g = g.reshape(-1, groups, shape[0] // groups).movedim(1, 0)
    torch.testing.assert_close(B, g.mT @ g / N)
