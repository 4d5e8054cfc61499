"""Laplace posteriors: evidence and predictions of a digits classifier, error bars of a regression.

python -m examples.laplace
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lrkfac
from examples.common import TRAINING_EXAMPLES, digits
from examples.minimum import Params, minimum, squared_length
from examples.report import positive, save_table
from lrkfac.curvature import Laplace, estimate, laplace
from lrkfac.structures import dense, full, kronecker, low_rank, low_rank_plus_diagonal

NOISE = 0.1  # standard deviation of the regression's targets
DRAWS = 100
HEADINGS = (
    "log evidence\n[nats]",
    "with split\ndamping",
    "best prior\nprecision",
    "test loss,\nlinearised",
    "by draws",
)


def low(rank: int) -> Any:
    """The default structure of this rank."""
    return kronecker(low_rank(rank), low_rank_plus_diagonal(rank))


STRUCTURES = {
    "exact Gauss-Newton": full(),
    "dense K-FAC": kronecker(dense(), dense()),
    "rank 32": low(32),
    "rank 16": low(16),
    "rank 8": low(8),
    "rank 4": low(4),
}


def split_evidence(posterior: Laplace, fisher: Any, loss: Tensor) -> Tensor:
    """Return the evidence with damping that is split between factors, as it is in a step."""
    inverse = fisher.scale(posterior.examples).inverse(posterior.prior_precision)
    exact = posterior.likelihood.damped(posterior.prior_precision).logdet()
    return posterior.log_evidence(loss) + (exact + inverse.logdet()) / 2


def best_precision(posterior: Laplace, loss: Tensor, steps: int = 12) -> Tensor:
    """Return the prior precision of the largest evidence, by Newton's method in its logarithm."""

    def evidence(log_precision: Tensor) -> Tensor:
        return posterior.log_evidence(loss, log_precision.exp())

    log_precision = posterior.prior_precision.log()
    for _ in range(steps):
        slope = torch.func.grad(evidence)(log_precision)
        bend = torch.func.grad(torch.func.grad(evidence))(log_precision)
        log_precision = log_precision + (slope / bend.abs().clamp(min=1e-3)).clamp(-0.5, 0.5)
    return log_precision.exp()


def classifier(
    seed: int, prior_precision: float, hidden: int, structures: Sequence[str], console: Console
) -> tuple[Table, dict[str, tuple[Laplace, Tensor]]]:
    """Return the table of the digits, and each posterior with its training loss."""
    pixels, labels = digits()
    pixels = pixels.double()
    x, y, test_x, test_y = (
        *(z[:TRAINING_EXAMPLES] for z in (pixels, labels)),
        *(z[TRAINING_EXAMPLES:] for z in (pixels, labels)),
    )
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    model, start = lrkfac.from_module(net)

    def objective(params: Params) -> Tensor:
        return F.cross_entropy(model(params, x), y) + prior_precision / (2 * len(x)) * squared_length(params)

    params = minimum(objective, start)
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator="exact")
    loss = evaluate(params, x, y, statistics=False).loss
    batches = list(zip(x.split(250), y.split(250), strict=True))
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(DRAWS, *p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
    title = f"digits, 64-{hidden}-10, prior precision {prior_precision:g}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("curvature", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    posteriors = {}
    for name in track(structures, "digits", console=console):
        fisher = estimate(evaluate, params, batches, layers, STRUCTURES[name])
        posterior = laplace(fisher, params, len(x), prior_precision)
        posteriors[name] = posterior, loss
        mean, covariance = posterior.predictive(model, test_x)
        scaled = mean / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
        drawn = posterior.draws(model, test_x, noise).softmax(-1).mean(0)
        table.add_row(
            name,
            f"{posterior.log_evidence(loss):.0f}",
            f"{split_evidence(posterior, fisher, loss):.0f}",
            f"{best_precision(posterior, loss):.2f}",
            f"{F.cross_entropy(scaled, test_y):.3f}",
            f"{F.nll_loss(drawn.log(), test_y):.3f}",
        )
    table.caption = f"test loss of the trained parameters {F.cross_entropy(model(params, test_x), test_y):.3f} nats"
    return table, posteriors


def regression(seed: int) -> tuple[Table, dict[str, Tensor]]:
    """Return the table of a regression, and what its picture shows: bands of all layers and of the last one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.rand(40, 1, generator=generator) - 2, torch.rand(40, 1, generator=generator) + 1]).double()
    y = (2 * x).sin() + NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    model, start = lrkfac.from_module(net)
    likelihood = lrkfac.gaussian(NOISE**2)
    layers = lrkfac.find_layers(model, start, x)
    evaluate = lrkfac.evaluator(model, likelihood, layers, estimator="exact")
    params = minimum(lambda p: likelihood.loss(model(p, x), y) + squared_length(p) / (2 * len(x)), start)
    fisher = estimate(evaluate, params, [(x, y)], layers, rank=16, passes=5)
    loss = evaluate(params, x, y, statistics=False).loss + math.log(2 * math.pi * NOISE**2) / 2
    grid = torch.linspace(-4, 4, 200, dtype=x.dtype)[:, None]
    shown = {"x": x, "y": y, "grid": grid, "mean": model(params, grid)}
    table = Table(title="regression, 1-24-24-1, rank 16", title_justify="left", box=SIMPLE)
    for heading in ("posterior of", "log evidence [nats]", "error bar at 0", "at a datum"):
        table.add_column(heading, justify="left" if heading.startswith("post") else "right")
    for name, part in {"all layers": fisher, "the last layer": fisher.of_layers([layers.layers[-1].name])}.items():
        posterior = laplace(part, params, len(x))
        shown[name] = posterior.predictive(model, grid).covariance[:, 0, 0].sqrt()
        at = posterior.predictive(model, torch.stack([torch.zeros(1, dtype=x.dtype), x[0]])).covariance[:, 0, 0].sqrt()
        table.add_row(name, f"{posterior.log_evidence(loss):.1f}", f"{at[0]:.3f}", f"{at[1]:.3f}")
    return table, shown


def _draw(path: Path, posteriors: dict[str, tuple[Laplace, Tensor]], shown: dict[str, Tensor]) -> None:
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10}):
        figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        grid, mean = shown["grid"][:, 0], shown["mean"][:, 0]
        for name, colour in (("all layers", "#56B4E9"), ("the last layer", "#E69F00")):
            band = 2 * shown[name]
            left.fill_between(grid, mean - band, mean + band, color=colour, alpha=0.35, linewidth=0, label=name)
        left.plot(grid, mean, color="#000000", linewidth=1.6)
        left.scatter(shown["x"], shown["y"], s=8, color="#D55E00", zorder=3)
        left.set_ylim(-5, 5)
        left.set_xlabel("x")
        left.set_title("regression, mean ± 2 standard deviations", loc="left")
        left.legend(frameon=False)
        precisions = torch.logspace(-0.7, 0.8, 16, dtype=torch.float64)
        for name, (posterior, loss) in posteriors.items():
            right.plot(precisions, [posterior.log_evidence(loss, d) for d in precisions], label=name)
        right.set_xscale("log")
        right.set_xlabel("prior precision")
        right.set_title("digits, log evidence [nats]", loc="left")
        right.legend(frameon=False)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#DDDDDD", linewidth=0.6)
            axis.set_axisbelow(True)
        figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    table, posteriors = classifier(options.seed, options.prior_precision, options.hidden, options.structures, console)
    console.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    save_table(table, options.output / "laplace.json")
    table, shown = regression(options.seed)
    console.print(table)
    picture = options.output / "laplace.png"
    _draw(picture, posteriors, shown)
    console.print(f"wrote {picture} and {picture.with_suffix('.json')}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.laplace",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prior-precision", type=float, default=1.0, metavar="D", help="prior precision of the digits classifier")
    add("--hidden", type=positive, default=16, metavar="N", help="hidden units of the digits classifier")
    names = list(STRUCTURES)
    add("--structures", nargs="+", choices=names, default=names, metavar="NAME", help="rows of the table")
    add("--seed", type=int, default=0, metavar="S", help="seed of all random numbers")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    add("--output", type=Path, default=Path("examples/output"), metavar="DIR", help="folder for the results")
    return parser


if __name__ == "__main__":
    main()
