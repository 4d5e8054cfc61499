"""The networks that are timed, as modules, with a random batch for each."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.resnet18 import ResNet18

CLASSES = 10


class Work(NamedTuple):
    """A network and one batch; the loss is the mean cross-entropy of all its terms."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of outputs ``[*shape, classes]`` and targets ``[*shape]``."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def perceptron(
    width: int, batch_size: int, device: torch.device, depth: int = 3, bias: bool = True, seed: int = 0
) -> Work:
    """``depth`` hidden layers with ReLU and a linear one of ten classes."""
    torch.manual_seed(seed)
    sizes = [width] * (depth + 1) + [CLASSES]
    with device:
        linear = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
        module = nn.Sequential(*[part for one in linear for part in (one, nn.ReLU())][:-1])
        return Work(module, torch.randn(batch_size, width), torch.randint(CLASSES, (batch_size,)))


def resnet18(batch_size: int, device: torch.device) -> Work:
    """ResNet-18 and images of 32 x 32."""
    torch.manual_seed(0)
    with device:
        return Work(ResNet18(CLASSES), torch.randn(batch_size, 3, 32, 32), torch.randint(CLASSES, (batch_size,)))


class Attention(nn.Module):
    """Causal, with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, dim=-1))
        return self.outer(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Radford et al. 2019: normalisation first, GELU, learned positions; the output layer is not tied."""

    def __init__(
        self, blocks: int = 6, width: int = 384, heads: int = 6, context: int = 128, tokens: int = 256
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.attention = nn.ModuleList([Attention(width, heads) for _ in range(blocks)])
        self.perceptrons = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(blocks)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * blocks + 1)])
        self.head = nn.Linear(width, tokens)

    def forward(self, numbers: Tensor) -> Tensor:
        """Logits ``[N, T, tokens]`` of numbers ``[N, T]``."""
        x = self.tokens(numbers) + self.positions
        for i, (attention, perceptron) in enumerate(zip(self.attention, self.perceptrons, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + perceptron(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def gpt(
    batch_size: int, device: torch.device, blocks: int = 6, width: int = 384, heads: int = 6, context: int = 128
) -> Work:
    """A GPT on bytes."""
    torch.manual_seed(0)
    with device:
        module = GPT(blocks, width, heads, context)
        numbers = torch.randint(256, (batch_size, context + 1))
    return Work(module, numbers[:, :-1], numbers[:, 1:])
