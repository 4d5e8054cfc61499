"""A residual network with BatchNorm and in-place ReLU, unmodified, takes ten low-rank K-FAC steps.

python -m examples.resnet
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lrkfac
from examples.report import positive, progress_bar

CLASSES = 8
SIZE = 16  # pixels, height and width
NOISE = 0.5  # standard deviation of the noise on a grating of amplitude 1

LEARNING_RATE = 0.1
KL_CLIP = 0.01  # ten times the default, since ten steps are all there are


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or d_in != d_out:
            self.shortcut = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, d_in, H, W]`` to ``[N, d_out, H / stride, W / stride]``."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A stem, a block for each width, and a linear head on the mean over positions."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        strides = [1] + [2] * (len(widths) - 1)
        sizes = zip((widths[0], *widths), widths, strides, strict=False)
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, CLASSES]`` of images ``[N, 3, H, W]``."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def gratings(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy stripes ``[number, 3, SIZE, SIZE]`` of random colour and phase; the class is their angle."""
    labels = torch.randint(CLASSES, (number,), generator=generator)
    angle = math.pi * labels / CLASSES
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * column + angle.sin()[:, None, None] * row
    phase = 2 * math.pi * torch.rand(number, 1, 1, generator=generator)
    colour = torch.rand(number, 3, 1, 1, generator=generator)
    stripes = torch.sin(2 * math.pi * along / 5 + phase)  # 5 pixels from one stripe to the next
    noise = torch.randn(number, 3, SIZE, SIZE, generator=generator)
    return colour * stripes[:, None] + NOISE * noise, labels


def main() -> None:
    """Run the example."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    console = Console()

    # BatchNorm's running averages travel with the data: model(params, (buffers, images)) -> outputs, buffers.
    model, params, buffers = lrkfac.from_module(ResNet(), buffers=True)
    images, labels = gratings(arguments.batch_size, generator)
    layers = lrkfac.find_layers(model, params, (buffers, images))
    console.print(str(layers), highlight=False, soft_wrap=True)

    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, has_aux=True)
    transformation = lrkfac.low_rank_kfac(layers, LEARNING_RATE, rank=arguments.rank, kl_clip=KL_CLIP)
    state = transformation.init(params)

    table = Table(title=f"low-rank K-FAC, rank {arguments.rank}", title_justify="left", box=SIMPLE)
    for heading in ("step", "loss, nats", "accuracy, %", "seconds"):
        table.add_column(heading, justify="right")
    with progress_bar(console) as progress:
        bar = progress.add_task("ResNet", total=arguments.steps, loss="")
        for step in range(1, arguments.steps + 1):
            start = time.perf_counter()
            evaluation = evaluate(params, (buffers, images), labels)
            updates, state = transformation.update(evaluation.grads, state, params, evaluation=evaluation)
            params, buffers = lrkfac.apply_updates(params, updates), evaluation.aux
            seconds = time.perf_counter() - start
            loss = f"{evaluation.loss.item():.3f}"
            accuracy = 100 * (evaluation.outputs.argmax(dim=1) == labels).float().mean().item()
            table.add_row(str(step), loss, f"{accuracy:.0f}", f"{seconds:.2f}")
            progress.update(bar, completed=step, loss=loss, refresh=True)
            images, labels = gratings(arguments.batch_size, generator)
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.resnet",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=positive, default=10, metavar="N", help="training steps")
    add("--batch-size", type=positive, default=128, metavar="N", help="new images per step")
    add("--rank", type=positive, default=16, metavar="R", help="rank of the factors")
    add("--seed", type=int, default=0, metavar="S", help="seed of weights, images and sampled labels")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
