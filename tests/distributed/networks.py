"""Small networks of every kind, each with its likelihood and a way to draw a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrkfac

IGNORED = -100
VOCABULARY, CONTEXT, WIDTH = 9, 5, 8


class Network(NamedTuple):
    """``draw(generator, n, dtype)`` returns inputs and targets of ``n`` examples."""

    module: Callable[[], nn.Module]
    likelihood: Any
    draw: Callable[[torch.Generator, int, torch.dtype], tuple[Any, Any]]


def images(generator: torch.Generator, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(generator, dtype, n, 2, 6, 6), torch.randint(3, (n,), generator=generator)


def rows(size: int) -> Callable[[torch.Generator, int, torch.dtype], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normal(generator, dtype, n, size), torch.randint(3, (n,), generator=generator)

    return draw


def tokens(generator: torch.Generator, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three in ten targets are ignored."""
    x, y = torch.randint(VOCABULARY, (2, n, CONTEXT), generator=generator)
    return x, y.where(torch.rand(n, CONTEXT, generator=generator) > 0.3, IGNORED)


def two_targets(generator: torch.Generator, n: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the classes many are ignored, of the values none."""
    x, classes = rows(6)(generator, n, dtype)
    classes = classes.where(torch.rand(n, generator=generator) > 0.4, IGNORED)
    return x, {"class": classes, "value": normal(generator, dtype, n, 2)}


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    # Drawn in float64, so that float32 sees the same batches.
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Transformer(nn.Module):
    """One block of causal attention; the embedding's table is that of the outputs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions.weight
        q, k, v = self.attention(self.before(h)).chunk(3, dim=-1)
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(torch.ones(CONTEXT, CONTEXT).triu(1).bool(), -torch.inf)
        h = h + self.projection(scores.softmax(-1) @ v)
        h = h + self.narrow(F.gelu(self.wide(self.after(h))))
        return F.linear(h, self.tokens.weight)


class Shared(nn.Module):
    """A linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.of_class, self.of_value = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"class": self.of_class(h), "value": self.of_value(h)}


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip


def wide() -> nn.Module:
    """Gradients of few rows are held as rows, ``thin=True``."""
    return nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 3))


def convolutions() -> nn.Module:
    """In training mode, BatchNorm takes mean and variance over the examples of one process."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


CLASSES, WORDS = lrkfac.categorical(), lrkfac.categorical(ignore_index=IGNORED)
NETWORKS = {
    "mlp": Network(perceptron, CLASSES, rows(6)),
    "wide": Network(wide, CLASSES, rows(80)),
    "conv": Network(lambda: convolutions().eval(), CLASSES, images),
    "conv, train": Network(convolutions, CLASSES, images),
    "gpt": Network(Transformer, WORDS, tokens),
    "shared": Network(Shared, CLASSES, rows(6)),
    "heads": Network(Heads, lrkfac.joint({"class": WORDS, "value": lrkfac.gaussian()}), two_targets),
}
