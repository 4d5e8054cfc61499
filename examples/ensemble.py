"""Eight networks in one call: ``torch.func.vmap`` maps a step over parameters, state and data of an ensemble.

python -m examples.ensemble
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optree
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import vmap

import lrkfac
from examples.report import positive, progress_bar

WIDTHS = (1, 32, 32, 1)
EXAMPLES = 96
NOISE = 0.1  # standard deviation of the targets
BATCH = 48  # examples per step and member
REFRESH = 5  # steps between statistics
LEARNING_RATE = 0.1

Params = list[dict[str, Tensor]]


def init(generator: torch.Generator) -> Params:
    """Return weights of variance 1 / d_in, and biases spread over the inputs' range."""
    layers = []
    for d_in, d_out in itertools.pairwise(WIDTHS):
        weight = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
        layers.append({"weight": weight, "bias": torch.randn(d_out, generator=generator)})
    return layers


def network(params: Params, x: Tensor) -> Tensor:
    """Return means ``[N, 1]`` at inputs ``[N, 1]``."""
    for layer in params[:-1]:
        x = torch.tanh(F.linear(x, layer["weight"], layer["bias"]))
    return F.linear(x, params[-1]["weight"], params[-1]["bias"])


def truth(x: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.3 * x


def data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs on [-2, 2] with a gap in the middle, and noisy targets, both ``[EXAMPLES, 1]``."""
    x = 0.6 + 1.4 * torch.rand(EXAMPLES, 1, generator=generator)
    x[: EXAMPLES // 2] *= -1
    return x, truth(x) + NOISE * torch.randn(EXAMPLES, 1, generator=generator)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, generator = Console(), torch.Generator().manual_seed(options.seed)
    x, y = data(generator)

    # Every leaf gets an axis of members in front; each member resamples its data (Breiman's bagging).
    params = optree.tree_map(lambda *leaves: torch.stack(leaves), *(init(generator) for _ in range(options.members)))
    of_member = torch.randint(EXAMPLES, (options.members, EXAMPLES), generator=generator)
    inputs, targets = x[of_member], y[of_member]

    layers = lrkfac.find_layers(network, optree.tree_map(lambda leaf: leaf[0], params), x)
    evaluate = lrkfac.evaluator(network, lrkfac.gaussian(NOISE**2), layers)
    tx = lrkfac.low_rank_kfac(layers, LEARNING_RATE, rank=8)

    def step(refresh: bool, params: Params, state: Any, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Any, ...]:
        """Take one step of one member."""
        evaluation = evaluate(params, x, y, refresh, noise=noise)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        return evaluation.loss, lrkfac.apply_updates(params, updates), state

    state, losses, start = vmap(tx.init)(params), [], time.perf_counter()
    with progress_bar(console) as progress:
        bar = progress.add_task(f"{options.members} members", total=options.steps, loss="")
        for i in range(options.steps):
            batch = torch.randint(EXAMPLES, (options.members, BATCH, 1), generator=generator)
            noise = torch.rand(options.members, 1, BATCH, 1, generator=generator)  # to draw targets, for the statistics
            of_batch = inputs.gather(1, batch), targets.gather(1, batch)
            loss, params, state = vmap(step, in_dims=(None, 0, 0, 0, 0, 0))(
                i % REFRESH == 0, params, state, *of_batch, noise
            )
            losses.append(loss)
            progress.update(bar, completed=i + 1, loss=f"{loss.mean():.3f}", refresh=True)
    seconds = time.perf_counter() - start

    alone = _seconds_of_a_step(step, params, state, *of_batch, noise)
    grid = torch.linspace(-2.5, 2.5, 301)[:, None]
    predictions = vmap(network, in_dims=(0, None))(params, grid)[..., 0]
    _show(console, vmap(network, in_dims=(0, None))(params, x), y, 1000 * seconds / options.steps, 1000 * alone)
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "ensemble.png"
    _draw(picture, x, y, grid[:, 0], predictions, torch.stack(losses))
    console.print(f"wrote {picture}", highlight=False, soft_wrap=True)


def _seconds_of_a_step(step: Any, params: Params, state: Any, *rest: Tensor) -> float:
    """Return the time of a step of the first member alone, the mean over a refresh and the steps between."""
    member = optree.tree_map(lambda leaf: leaf[0], (params, state, *rest))
    step(True, *member)
    start = time.perf_counter()
    for i in range(4 * REFRESH):
        step(i % REFRESH == 0, *member)
    return (time.perf_counter() - start) / (4 * REFRESH)


def _show(console: Console, outputs: Tensor, y: Tensor, together: float, alone: float) -> None:
    table = Table(title="error on all examples, root mean square", title_justify="left", box=SIMPLE)
    table.add_column("member")
    table.add_column("error", justify="right")
    for i, member in enumerate(outputs):
        table.add_row(str(i + 1), f"{(member - y).square().mean().sqrt():.4f}")
    table.add_row("mean of all", f"{(outputs.mean(0) - y).square().mean().sqrt():.4f}")
    console.print(table)
    console.print(f"a step of all {len(outputs)}: {together:.1f} ms; of one alone: {alone:.1f} ms", highlight=False)


def _draw(path: Path, x: Tensor, y: Tensor, grid: Tensor, predictions: Tensor, losses: Tensor) -> None:
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10}):
        figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        mean, std = predictions.mean(0), predictions.std(0)
        left.fill_between(grid, mean - 2 * std, mean + 2 * std, color="#56B4E9", alpha=0.3, linewidth=0)
        left.plot(grid, predictions.T, color="#0072B2", linewidth=0.7, alpha=0.7)
        left.plot(grid, mean, color="#D55E00", linewidth=2, label="mean")
        left.plot(grid, truth(grid), color="#000000", linestyle=(0, (5, 2)), linewidth=1.2, label="truth")
        left.scatter(x, y, s=8, color="#666666", label="data", zorder=3)
        left.set_title("members, and their mean ± 2 standard deviations", loc="left")
        left.set_ylim(-3, 3)
        left.set_xlabel("x")
        left.legend(frameon=False, loc="lower right", ncols=3)
        right.plot(losses, color="#0072B2", linewidth=0.7, alpha=0.7)
        right.plot(losses.mean(1), color="#D55E00", linewidth=1.6)
        right.set_yscale("symlog", linthresh=1)
        right.set_title("loss of the batch [nats]", loc="left")
        right.set_xlabel("steps")
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#DDDDDD", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.margins(x=0)
        figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ensemble",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=positive, default=400, metavar="N", help="training steps")
    add("--members", type=positive, default=8, metavar="N", help="networks trained at once")
    add("--seed", type=int, default=0, metavar="S", help="seed of all random numbers")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    add("--output", type=Path, default=Path("examples/output"), metavar="DIR", help="folder for the picture")
    return parser


if __name__ == "__main__":
    main()
