"""The problems of ``time_to_loss``: pure functions with data, likelihood, batches and starts by seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrkfac
from benchmarks.data import diabetes, labelled_images, text, training_digits, training_images
from benchmarks.problem import Params, Problem
from examples import digits_autoencoder
from examples.text import init_transformer, text_windows, transformer, windows

CONTEXT, WIDTH, BLOCKS = 64, 128, 2  # of the transformer
FASHION_EXAMPLES = 20_000  # a third of Fashion-MNIST: three epochs are 468 steps
GPT_CONTEXT, GPT_WIDTH, GPT_BLOCKS = 128, 256, 6


# Models ------------------------------------------------------------------------------------------------


def perceptron(widths: tuple[int, ...], activation: Callable[[Tensor], Tensor], linear_at: int | None = None) -> Any:
    """Linear layers with an activation between them (but for the layer ``linear_at``): the model and ``init``.

    Weights are Glorot's for tanh and He's for ReLU, both normal; biases are zero.
    """
    pairs = list(itertools.pairwise(widths))

    def init(seed: int) -> Params:
        generator = torch.Generator().manual_seed(seed)
        params: Params = {}
        for i, (d_in, d_out) in enumerate(pairs):
            std = math.sqrt(2 / d_in) if activation is F.relu else math.sqrt(2 / (d_in + d_out))
            params[f"{i:02}.weight"] = std * torch.randn(d_out, d_in, generator=generator)
            params[f"{i:02}.bias"] = torch.zeros(d_out)
        return params

    def model(params: Params, x: Tensor) -> Tensor:
        for i in range(len(pairs)):
            x = F.linear(x, params[f"{i:02}.weight"], params[f"{i:02}.bias"])
            if i not in (linear_at, len(pairs) - 1):
                x = activation(x)
        return x

    return model, init


def convolutional(params: Params, pixels: Tensor) -> Tensor:
    """Three convolutions, two of them of stride 2, and a linear layer: logits of 8 x 8 images ``[N, 64]``."""
    x = pixels.unflatten(1, (1, 8, 8))
    for i, stride in enumerate((1, 2, 2)):
        x = F.relu(F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride, padding=1))
    return F.linear(x.flatten(1), params["head.weight"], params["head.bias"])


def init_convolutional(seed: int) -> Params:
    """He's normal weights."""
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    shapes = {"conv0": (16, 1, 3, 3), "conv1": (32, 16, 3, 3), "conv2": (64, 32, 3, 3), "head": (10, 256)}
    for name, shape in shapes.items():
        params[f"{name}.weight"] = math.sqrt(2 / math.prod(shape[1:])) * torch.randn(shape, generator=generator)
        params[f"{name}.bias"] = torch.zeros(shape[0])
    return params


def with_batch_norm() -> nn.Module:
    """Two convolutions of stride 2 with BatchNorm, and a linear layer: logits of 28 x 28 images ``[N, 784]``."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def init_with_batch_norm(seed: int) -> Params:
    """torch's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lrkfac.from_module(with_batch_norm())[1]


# Problems ----------------------------------------------------------------------------------------------


def entropy(pixels: Tensor) -> float:
    """The least Bernoulli loss of grey pixels as targets, summed over pixels, in nats per image."""
    negative = torch.special.xlogy(pixels, pixels) + torch.special.xlogy(1 - pixels, 1 - pixels)
    return -negative.sum(1).mean().item()


def digits_autoencoding(data: Path | None, activation: str) -> Problem:
    pixels = training_digits()[0]
    widths = "-".join(map(str, digits_autoencoder.WIDTHS))
    return Problem(
        f"Digits autoencoder {widths}, tanh", digits_autoencoder.autoencoder, lrkfac.bernoulli(),
        digits_autoencoder.init, pixels, pixels, batch_size=256, steps=1000, sgd_rate=0.03, floor=entropy(pixels),
        replacement=True,
    )  # fmt: skip


def deep_autoencoding(data: Path | None, activation: str) -> Problem:
    """Hinton & Salakhutdinov 2006, as in Ren & Goldfarb 2021 (arXiv 2106.02925); the code of 30 numbers is linear."""
    pixels, described = training_images(data)
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    model, init = perceptron(widths, {"relu": F.relu, "tanh": torch.tanh}[activation], linear_at=3)
    return Problem(
        f"Deep autoencoder 784-1000-500-250-30 and back, {activation}, {described}", model, lrkfac.bernoulli(), init,
        pixels, pixels, batch_size=1000, steps=3600, sgd_rate=0.003, floor=entropy(pixels),
    )  # fmt: skip


def digits_classification(data: Path | None, activation: str) -> Problem:
    pixels, labels = training_digits()
    model, init = perceptron((64, 256, 256, 10), torch.tanh)
    return Problem(
        "Digits classifier 64-256-256-10, tanh", model, lrkfac.categorical(), init, pixels, labels, batch_size=256,
        steps=500, sgd_rate=0.3, target=0.01,
    )  # fmt: skip


def digits_convolution(data: Path | None, activation: str) -> Problem:
    pixels, labels = training_digits()
    return Problem(
        "Digits by three convolutions, ReLU", convolutional, lrkfac.categorical(), init_convolutional, pixels, labels,
        batch_size=256, steps=300, sgd_rate=0.1, target=0.01,
    )  # fmt: skip


def regression(data: Path | None, activation: str) -> Problem:
    inputs, targets = diabetes()
    model, init = perceptron((10, 16, 16, 16, 16, 1), torch.tanh)
    return Problem(
        "Regression on diabetes, 10-16-16-16-16-1, tanh", model, lrkfac.gaussian(), init, inputs, targets,
        batch_size=128, steps=1000, sgd_rate=0.03,
    )  # fmt: skip


def characters(data: Path | None, activation: str) -> Problem:
    inputs, targets, vocabulary = text_windows(CONTEXT)
    return Problem(
        f"Characters of Python's reference, transformer of {BLOCKS} layers, width {WIDTH}, context {CONTEXT}",
        transformer, lrkfac.categorical(),
        lambda seed: init_transformer(seed, vocabulary, CONTEXT, WIDTH, BLOCKS), inputs, targets,
        batch_size=32, steps=1000, sgd_rate=0.3, evaluated=25, by_adam=("embedding", "position", "head.weight"),
    )  # fmt: skip


def fashion(data: Path | None, activation: str) -> Problem:
    """The unmodified module; BatchNorm's averages are buffers that travel, and judge with in evaluation mode."""
    inputs, targets, test_inputs, test_targets, described = labelled_images(data)
    inputs, targets = inputs[:FASHION_EXAMPLES], targets[:FASHION_EXAMPLES]
    model, _, buffers = lrkfac.from_module(with_batch_norm(), buffers=True)
    judged, _, _ = lrkfac.from_module(with_batch_norm().eval(), buffers=True)
    return Problem(
        f"Two convolutions with BatchNorm, the first {len(inputs)} of {described}", model, lrkfac.categorical(),
        init_with_batch_norm, inputs, targets, batch_size=128, steps=3 * (len(inputs) // 128), sgd_rate=0.1,
        evaluated=4, buffers=buffers, judged=judged, test_inputs=test_inputs, test_targets=test_targets,
    )  # fmt: skip


def gpt(data: Path | None, activation: str) -> Problem:
    codes, kinds, described = text(data)
    inputs, targets = windows(codes, GPT_CONTEXT)
    return Problem(
        f"Characters of {described}, GPT of {GPT_BLOCKS} layers, width {GPT_WIDTH}, context {GPT_CONTEXT}",
        transformer, lrkfac.categorical(),
        partial(init_transformer, vocabulary=len(kinds), context=GPT_CONTEXT, width=GPT_WIDTH, blocks=GPT_BLOCKS),
        inputs, targets, batch_size=16, steps=1000, sgd_rate=0.3, evaluated=max(1, len(inputs) // 64),
        by_adam=("embedding", "position", "head.weight"),
    )  # fmt: skip


def deep_narrow(data: Path | None, activation: str) -> Problem:
    pixels = training_digits()[0]
    model, init = perceptron((64,) * 21, torch.tanh)
    return Problem(
        "Digits through 20 layers of width 64, tanh", model, lrkfac.bernoulli(), init, pixels, pixels, batch_size=256,
        steps=1000, sgd_rate=0.01, floor=entropy(pixels), replacement=True,
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[Path | None, str], Problem]] = {
    "digits_autoencoder": digits_autoencoding,
    "deep_autoencoder": deep_autoencoding,
    "digits_classifier": digits_classification,
    "digits_cnn": digits_convolution,
    "regression": regression,
    "characters": characters,
    "deep_narrow": deep_narrow,
    "fashion_cnn": fashion,
    "gpt": gpt,
}
TAKE_DATA = ("deep_autoencoder", "fashion_cnn", "gpt")
"""Problems that ``--data`` concerns."""
