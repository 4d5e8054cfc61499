"""Time of a step and operations of a refresh against the number of layers of one width.

python -m benchmarks.depth
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import (
    COLOURS,
    argument_parser,
    results_table,
    wide_console,
    write_results,
)
from benchmarks.floors import started
from benchmarks.networks import perceptron
from benchmarks.ratio_tables import milliseconds, ratio
from benchmarks.ratios import SGD, Choice, Functional, low_rank, measured

MODULE = "benchmarks.depth"
LIMIT = 1.2
"""Operations of a refresh at the last depth, over those at the first."""
STEP, REFRESH_STEP = "step", "refresh step"
RANGES = {"lrkfac.refresh": "refresh", "lrkfac.apply": "apply"}


class Dispatched(TorchDispatchMode):
    """Counts operations, but for views: all of them, and those within each of the named ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.within: Counter[str] = Counter()
        self._open: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("profiler._record_function_enter"):
            self._open.append(args[0])
        elif name.startswith("profiler._record_function_exit"):
            self._open.pop()
        elif not (function.is_view or function is torch.ops.aten.detach.default):
            self.total += 1
            self.within.update(set(self._open))
        return function(*args, **(kwargs or {}))


def dispatched(function: Callable[[], Any]) -> Dispatched:
    """Operations of one call."""
    with Dispatched() as count:
        function()
    return count


def operations(width: int, depth: int, batch_size: int, rank: int) -> dict[str, int]:
    """Of an SGD step, a step and a refresh step of low-rank K-FAC, and of the parts of the latter."""
    functional = Functional(perceptron(width, batch_size, torch.device("cpu"), depth))
    ours = functional.low_rank(rank)
    assert ours.refresh is not None
    refresh = dispatched(ours.refresh)
    counted = {SGD: dispatched(functional.sgd().plain).total, STEP: dispatched(ours.plain).total}
    return {**counted, REFRESH_STEP: refresh.total, **{of: refresh.within[name] for name, of in RANGES.items()}}


def per_layer(depths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a line by least squares."""
    x, y = torch.tensor(depths, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp(min=1e-300))


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """Seconds on the left, operations on the right."""
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    depths = [one["depth"] for one in found]
    for colour, key in zip(COLOURS, (SGD, STEP, REFRESH_STEP), strict=False):
        left.plot(depths, [1e3 * one["seconds"][key] for one in found], marker="o", color=colour, label=key)
    left.set_ylabel("time [ms]")
    for colour, key in zip(COLOURS, found[0]["operations"], strict=False):
        right.plot(depths, [one["operations"][key] for one in found], marker="o", color=colour, label=key)
    right.set_ylabel("operations")
    for axis in (left, right):
        axis.set_xlabel("hidden layers")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64], metavar="L", help="numbers of hidden layers")
    add("--width", type=int, default=512, metavar="D", help="of the hidden layers")
    add("--batch-size", type=int, default=128, metavar="N", help="examples per batch")
    add("--rank", type=int, default=32, metavar="R", help="of the factors")
    add("--every", type=int, default=10, metavar="K", help="steps per refresh in the mean")
    add("--repeats", type=int, default=9, metavar="N", help="timings of each step")
    add("--compile", action="store_true", help="time compiled steps; operations are those of the eager ones")
    arguments = parser.parse_args()
    device, rates, described = started(MODULE, arguments)
    console, found = wide_console(), []
    choice = Choice((arguments.rank,), arguments.every, arguments.repeats, arguments.compile)
    for depth in arguments.depths:
        with console.status(f"measuring depth {depth}"):
            counted = operations(arguments.width, depth, arguments.batch_size, arguments.rank)
            work = perceptron(arguments.width, arguments.batch_size, device, depth)
            rows = {row["step"]: row for row in measured(work, choice, rates, device)["rows"]}
        ours = rows[low_rank(arguments.rank)]
        seconds = {SGD: rows[SGD]["seconds"], STEP: ours["seconds"], REFRESH_STEP: ours["refresh seconds"]}
        found.append({"depth": depth, "operations": counted, "seconds": seconds, "sgd": rows[SGD], "ours": ours})
    how = "compiled" if arguments.compile else "eager"
    title = f"Width {arguments.width}, batch {arguments.batch_size}, rank {arguments.rank}, {how}, float32"
    headings = ["hidden layers", "SGD [ms]", "floor", "step [ms]", "floor", "/SGD", "refresh_step [ms]", "floor"]
    headings += ["/SGD", f"mean_of_{arguments.every} /SGD", *(f"calls: {key}" for key in found[0]["operations"])]
    console.print(results_table(title, headings, [
        [str(one["depth"]), *(milliseconds(one["sgd"], key) for key in ("seconds", "floor")),
         *(milliseconds(one["ours"], key) for key in ("seconds", "floor")), ratio(one["ours"], "ratio"),
         *(milliseconds(one["ours"], key) for key in ("refresh seconds", "refresh floor")),
         *(ratio(one["ours"], key) for key in ("refresh ratio", "mean ratio")),
         *(str(number) for number in one["operations"].values())]
        for one in found
    ]))  # fmt: skip
    slopes = {key: per_layer(arguments.depths, [one["seconds"][key] for one in found]) for key in found[0]["seconds"]}
    growth = found[-1]["operations"]["refresh"] / found[0]["operations"]["refresh"]
    shown = ", ".join(f"{key} {1e3 * slope:.2f}" for key, slope in slopes.items())
    console.print(f"ms per layer: {shown}")
    console.print(
        f"operations of a refresh, depth {arguments.depths[-1]} / depth {arguments.depths[0]}: {growth:.2f} "
        f"(limit {LIMIT}); in the refresh step are the passes through the network, too"
    )
    console.print(described)
    content = {"environment": described, "limit": LIMIT, "seconds per layer": slopes, "growth": growth, "depths": found}
    path = arguments.output / f"depth_{how}_{device.type}.json"
    write_results(path, content, draw(found), console)


if __name__ == "__main__":
    main()
