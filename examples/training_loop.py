"""A plain training loop with the torch.optim class: schedule, gradient clipping, checkpoints, and a run that resumes.

python -m examples.training_loop
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import nn

import lrkfac
from examples.common import TRAINING_EXAMPLES, digits
from examples.report import positive, progress_bar

BATCH = 128
LEARNING_RATE = 0.1
MAX_NORM = 1.0  # of the gradient


class Epoch(NamedTuple):
    """Results of an epoch."""

    loss: float
    accuracy: float
    learning_rate: float
    norm: float


class Training:
    """A network with optimizer and scheduler, and their checkpoints."""

    def __init__(self, epochs: int, seed: int) -> None:
        pixels, labels = digits()
        self.images, self.labels = pixels.reshape(-1, 1, 8, 8), labels
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        self.optimizer = lrkfac.LowRankKFAC(
            self.net,
            lrkfac.categorical(),
            self.images[:1],
            lr=LEARNING_RATE,
            rank=16,
            statistics_every=5,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)

    def epoch(self, progress: Progress, bar: TaskID) -> Epoch:
        """Go once through the training set."""
        total, norms = 0.0, []
        rate = self.optimizer.param_groups[0]["lr"]
        batches = torch.randperm(TRAINING_EXAMPLES).split(BATCH)
        for batch in batches:
            loss = self.optimizer.evaluate(self.images[batch], self.labels[batch]).loss.item()
            norms.append(nn.utils.clip_grad_norm_(self.net.parameters(), MAX_NORM).item())
            self.optimizer.step()
            total += loss * len(batch)
            progress.update(bar, advance=1, loss=f"{loss:.3f}", refresh=True)
        self.scheduler.step()
        with torch.no_grad():
            correct = self.net(self.images[TRAINING_EXAMPLES:]).argmax(1) == self.labels[TRAINING_EXAMPLES:]
        return Epoch(total / TRAINING_EXAMPLES, 100 * correct.float().mean().item(), rate, sum(norms) / len(norms))

    def tree(self) -> dict[str, object]:
        """Return everything beside the optimizer's state: tensors and numbers."""
        return {
            "params": self.optimizer.params,
            "random": torch.get_rng_state(),
            "steps": self.optimizer.steps,
            "epochs": self.scheduler.last_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def save(self, path: Path) -> None:
        lrkfac.checkpoint.save(path, self.tree(), self.optimizer.chain_state, self.optimizer.layers)

    def load(self, path: Path) -> None:
        tree, state = lrkfac.checkpoint.load(path, self.tree(), self.optimizer.chain_state, self.optimizer.layers)
        self.net.load_state_dict(tree["params"])
        torch.set_rng_state(tree["random"])
        self.optimizer.chain_state, self.optimizer.steps = state, tree["steps"]
        self.optimizer.param_groups[0]["lr"], self.scheduler.last_epoch = tree["lr"], tree["epochs"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example: all epochs, then the second half once more from a checkpoint."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, half = Console(), options.epochs // 2
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "training_loop.safetensors"
    steps = -(-TRAINING_EXAMPLES // BATCH)

    training, epochs = Training(options.epochs, options.seed), []
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=options.epochs * steps, loss="")
        for epoch in range(options.epochs):
            if epoch == half:
                training.save(checkpoint)
            epochs.append(training.epoch(progress, bar))

        resumed = Training(options.epochs, options.seed + 1)
        resumed.load(checkpoint)
        bar = progress.add_task("resumed from the middle", total=(options.epochs - half) * steps, loss="")
        for _ in range(half, options.epochs):
            resumed.epoch(progress, bar)

    _show(console, epochs)
    pairs = zip(training.net.parameters(), resumed.net.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    console.print(f"parameters of the resumed run: {'equal bit for bit' if equal else 'DIFFERENT'}", highlight=False)
    picture = options.output / "training_loop.png"
    _draw(picture, epochs)
    console.print(f"wrote {picture} and {checkpoint}", highlight=False, soft_wrap=True)


def _show(console: Console, epochs: Sequence[Epoch]) -> None:
    table = Table(title="digits, two convolutions and a linear layer", title_justify="left", box=SIMPLE)
    for heading in ("epoch", "learning rate", "loss, nats", "test accuracy, %", "gradient norm"):
        table.add_column(heading, justify="right")
    for i, epoch in enumerate(epochs, 1):
        row = f"{epoch.learning_rate:.4f}", f"{epoch.loss:.4f}", f"{epoch.accuracy:.1f}", f"{epoch.norm:.3f}"
        table.add_row(str(i), *row)
    console.print(table)


def _draw(path: Path, epochs: Sequence[Epoch]) -> None:
    numbers = range(1, len(epochs) + 1)
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11}):
        figure = Figure(figsize=(10, 3.2), dpi=150, layout="constrained")
        panels = {
            "loss [nats]": [e.loss for e in epochs],
            "test accuracy [%]": [e.accuracy for e in epochs],
            "learning rate": [e.learning_rate for e in epochs],
        }
        for axis, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            axis.plot(numbers, values, color="#D55E00", marker="o", markersize=3)
            axis.set_title(title, loc="left")
            axis.set_xlabel("epoch")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#DDDDDD", linewidth=0.6)
            if title.startswith("loss"):
                axis.set_yscale("log")
        figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.training_loop",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=positive, default=16, metavar="N", help="passes through the training set")
    add("--seed", type=int, default=0, metavar="S", help="seed of weights, batches and sampled labels")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    add("--output", type=Path, default=Path("examples/output"), metavar="DIR", help="folder for the results")
    return parser


if __name__ == "__main__":
    main()
