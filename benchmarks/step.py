"""Time of a training step of low-rank K-FAC beside a plain functional SGD step, by width.

python -m benchmarks.step
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import optree
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.func import grad_and_value
from torch.utils.flop_counter import FlopCounterMode

import lrkfac
from benchmarks.common import (
    COLOURS,
    RESULTS,
    environment,
    interleaved,
    median_ratios,
    results_table,
    save_figure,
    write_json,
    written,
)

MODULE = "benchmarks.step"
SGD = "SGD"
PRODUCT = "product"
MOMENTUM = "SGD, momentum"
LIMITS = {"mean": 1.15, "refresh": 2.0}
"""What a step, refreshes included, and a refresh step alone (at width 2048) may cost, in SGD steps."""
LAYERS, CLASSES = 3, 10
VARIANTS: dict[str, dict[str, float]] = {
    "": {}, ", weight decay": {"weight_decay": 5e-4}, ", no momentum": {"momentum": 0.0},
}  # fmt: skip


def perceptron(width: int, batch_size: int, device: torch.device) -> tuple[Any, dict[str, Any], Tensor, Tensor]:
    """A model with three hidden layers and biases, its parameters and a batch."""
    torch.manual_seed(0)
    sizes = [width] * (LAYERS + 1) + [CLASSES]
    params = {
        f"{i}": {"weight": torch.randn(b, a, device=device) / a**0.5, "bias": torch.zeros(b, device=device)}
        for i, (a, b) in enumerate(pairwise(sizes))
    }

    def model(params: dict[str, Any], x: Tensor) -> Tensor:
        for i in range(LAYERS):
            x = torch.relu(F.linear(x, **params[f"{i}"]))
        return F.linear(x, **params[f"{LAYERS}"])

    images = torch.randn(batch_size, width, device=device)
    return model, params, images, torch.randint(CLASSES, (batch_size,), device=device)


def steps(width: int, batch_size: int, rank: int, compiled: bool, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The steps that are compared; each starts from the same parameters and state."""
    model, params, x, y = perceptron(width, batch_size, device)

    def gradients(params: Any) -> Any:
        return grad_and_value(lambda p: F.cross_entropy(model(p, x), y))(params)[0]

    def sgd() -> Any:
        return optree.tree_map(lambda p, g: p - 0.1 * g, params, gradients(params))

    momentum = lrkfac.chain(lrkfac.trace(0.9), lrkfac.scale_by_learning_rate(0.1))
    velocity = momentum.init(params)

    def with_momentum() -> Any:
        updates, state = momentum.update(gradients(params), velocity, params)
        return lrkfac.apply_updates(params, updates), state

    found: dict[str, Callable[[], Any]] = {SGD: sgd, MOMENTUM: with_momentum}
    layers = lrkfac.find_layers(model, params, x)
    for route, thin in (("formed", False), ("thin", True)):
        evaluate = lrkfac.fisher(model, lrkfac.categorical(), layers, "mc", thin=thin)
        for name, options in (
            ("", {}),
            (", weight decay", {"weight_decay": 5e-4}),
            (", no momentum", {"momentum": 0.0}),
        ):
            if options and not thin:
                continue
            tx = lrkfac.low_rank_kfac(layers, 0.1, rank=rank, **options)
            first = evaluate(params, x, y)
            state = tx.update(first.grads, tx.init(params), params, evaluation=first)[1]

            def step(refresh: bool, evaluate: Any = evaluate, tx: Any = tx, state: Any = state) -> Any:
                e = evaluate(params, x, y, statistics=refresh)
                updates, new = tx.update(e.grads, state, params, evaluation=e)
                return lrkfac.apply_updates(params, updates), new

            found[f"{route}{name}"] = partial(step, False)
            found[f"{route}{name}, refresh"] = partial(step, True)
    return {name: torch.compile(f, fullgraph=True) for name, f in found.items()} if compiled else found


def products(width: int, batch_size: int, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """One product of a weight and a batch, and to how many of these the operations of an SGD step amount."""
    model, params, x, y = perceptron(width, batch_size, device)
    with FlopCounterMode(display=False) as count:
        grad_and_value(lambda p: F.cross_entropy(model(p, x), y))(params)
    weight = params["0"]["weight"]
    return lambda: x @ weight, count.get_total_flops() / (2 * batch_size * width**2)


def measured(
    width: int, batch_size: int, rank: int, every: int, compiled: bool, device: torch.device, repeats: int
) -> Any:
    """Ratios to the SGD step at one width: of plain and refresh steps, and their mean over ``every`` steps."""
    product, number = products(width, batch_size, device)
    both = {**steps(width, batch_size, rank, compiled, device), PRODUCT: product}
    seconds = interleaved(both, device, repeats)
    ratios = median_ratios(seconds, SGD)
    best = {name: min(times) / min(seconds[SGD]) for name, times in seconds.items()}
    sgd = statistics.median(seconds[SGD])
    rows = []
    for name in (name for name in ratios if not name.endswith("refresh") and name != PRODUCT):
        again = f"{name}, refresh"
        row = {"width": width, "step": name, "ratio": ratios[name], "ratio of minima": best[name]}
        if again in ratios:
            row |= {"refresh": ratios[again], "mean": ((every - 1) * ratios[name] + ratios[again]) / every}
        rows.append(row)
    return {"width": width, "SGD seconds": sgd, "products / SGD": number * best[PRODUCT], "rows": rows}


def draw(found: list[dict[str, Any]]) -> Figure:
    """The mean ratio against the width."""
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    names = [row["step"] for row in found[0]["rows"] if row["step"] != SGD]
    widths = [one["width"] for one in found]
    for name, colour in zip(names, COLOURS[1:], strict=False):
        values = [next(row.get("mean", row["ratio"]) for row in one["rows"] if row["step"] == name) for one in found]
        axis.plot(widths, values, marker="o", color=colour, label=name)
    axis.plot(widths, [one["products / SGD"] for one in found], color=COLOURS[7], linestyle=":", label="SGD's products")
    axis.axhline(LIMITS["mean"], color=COLOURS[0], linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.set_xlabel(f"width (dashed: {LIMITS['mean']})")
    axis.set_ylabel("time of a step / SGD step")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Runs the benchmark."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    described = environment(arguments.threads, device)
    console, found = Console(), []
    options = (arguments.batch_size, arguments.rank, arguments.every, arguments.compiled, device, arguments.repeats)
    for width in arguments.widths:
        with console.status(f"measuring width {width}"):
            found.append(measured(width, *options))
    how = "compiled" if arguments.compiled else "eager"
    title = f"Step / SGD step, {how}, batch {arguments.batch_size}, rank {arguments.rank}, float32"
    headings = ["step", "width", "ratio", "of minima", "refresh", f"mean of {arguments.every}"]
    console.print(results_table(title, headings, [
        [row["step"], str(row["width"]),
         *(f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "ratio of minima", "refresh", "mean"))]
        for one in found for row in one["rows"]
    ]))  # fmt: skip
    for one in found:
        console.print(
            f"width {one['width']}: an SGD step takes {1e3 * one['SGD seconds']:.1f} ms, "
            f"{one['products / SGD']:.2f} of it the products of matrices, which no step can do without"
        )
    console.print(f"limits: mean {LIMITS['mean']}, refresh {LIMITS['refresh']} at width 2048; {described}")
    path = RESULTS / f"step_{how}_{device.type}.json"
    write_json(path, {"environment": described, "options": vars(arguments), "widths": found})
    written(path, console)
    save_figure(path.with_suffix(".png"), draw(found), console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[1024, 2048, 4096], metavar="D", help="of the hidden layers")
    add("--batch-size", type=int, default=128, metavar="N", help="examples per batch")
    add("--rank", type=int, default=32, metavar="R", help="of the factors")
    add("--every", type=int, default=10, metavar="K", help="steps per refresh in the mean")
    add("--repeats", type=int, default=15, metavar="N", help="timings of each step")
    add("--compiled", action="store_true", help="all steps by torch.compile")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure")
    add("--threads", type=int, default=2, metavar="N", help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
