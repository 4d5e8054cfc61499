"""The command, table and picture of steps beside an SGD step: ``step``, ``convolutions`` and ``transformer``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common import (
    COLOURS,
    argument_parser,
    results_table,
    wide_console,
    write_json,
    write_results,
)
from benchmarks.floors import started
from benchmarks.networks import Work
from benchmarks.ratios import Choice, measured

PACKAGES = ("asdfghjkl", "curvlinops-for-pytorch")


def parser_of_ratios(
    module: str, description: str | None, ranks: Sequence[int], repeats: int
) -> argparse.ArgumentParser:
    """The options that the tables have in common."""
    parser = argument_parser(module, description)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=list(ranks), metavar="R", help="of the factors")
    add("--every", type=int, default=10, metavar="K", help="steps per refresh in the mean")
    add("--repeats", type=int, default=repeats, metavar="N", help="timings of each step")
    add("--compile", action="store_true", help="all steps by torch.compile, without dense factors and libraries")
    add("--no-dense", action="store_true", help="leave out dense K-FAC and other libraries")
    add("--variants", action="store_true", help="the first rank also formed, without momentum, with weight decay")
    return parser


def choice_of(arguments: argparse.Namespace, **options: Any) -> Choice:
    """What the options say, unless ``options`` know better."""
    chosen = {
        "ranks": tuple(arguments.ranks), "every": arguments.every, "repeats": arguments.repeats,
        "compiled": arguments.compile, "dense": not arguments.no_dense, "variants": arguments.variants,
    }  # fmt: skip
    return Choice(**{**chosen, **options})


def report(
    module: str,
    title: str,
    size: str,
    limit: float,
    works: Iterable[tuple[int, Choice, Callable[[torch.device], Work]]],
    arguments: argparse.Namespace,
) -> None:
    """Measures the work of each size in turn, prints the table and writes the results.

    ``size`` is what the sizes are: of the network or of the batch; ``limit`` is for the mean ratio.
    """
    device, rates, described = started(module, arguments, PACKAGES)
    console, found = wide_console(), []
    how = "compiled" if arguments.compile else "eager"
    path = arguments.output / f"{module.rpartition('.')[2]}_{how}_{device.type}.json"
    content = {"environment": described, "limit": limit, "size": size, "measured": found}
    for number, choice, make in works:
        with console.status(f"measuring {size} {number}"):
            found.append({size: number, **measured(make(device), choice, rates, device)})
        write_json(path, content)  # what there is, should the rest be interrupted
    console.print(ratios_table(f"{title}, {how}, float32", size, found, arguments.every))
    for one in found:
        for name, why in one["missing"].items():
            console.print(f"{size} {one[size]}: no {name}: {why}", highlight=False)
        if one["capture ratio"] is not None:
            console.print(f"{size} {one[size]}: empirical statistics / plain gradient: {one['capture ratio']:.3f}")
    console.print(
        f"limit of the mean: {limit}. Floors: operations at {rates.operations / 1e9:.1f} GFlop/s (a product of "
        f"squares), or bytes at {rates.bytes / 1e9:.1f} GB/s (a copy), whichever takes longer."
    )
    console.print(described)
    write_results(path, content, draw(size, found, limit), console)


def by_batch_size(
    module: str,
    description: str | None,
    title: str,
    limit: float,
    make: Callable[[int, torch.device], Work],
    batch_sizes: Sequence[int],
    dense_up_to: int,
) -> None:
    """The command for one network: batches of several sizes, the larger ones timed less often."""
    parser = parser_of_ratios(module, description, ranks=(32,), repeats=9)
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=list(batch_sizes), metavar="N", help="examples per batch")
    add("--dense-up-to", type=int, default=dense_up_to, metavar="N", help="the largest batch with dense K-FAC")
    arguments = parser.parse_args()
    works = []
    for size in arguments.batch_sizes:
        repeats = max(2, arguments.repeats * min(arguments.batch_sizes) // size)
        dense = not arguments.no_dense and size <= arguments.dense_up_to
        works.append((size, choice_of(arguments, repeats=repeats, dense=dense), partial(make, size)))
    report(module, title, "batch", limit, works, arguments)


def milliseconds(row: dict[str, Any], key: str) -> str:
    """Or nothing where there is no such number."""
    return "" if row.get(key) is None else f"{1e3 * row[key]:.1f}"


def ratio(row: dict[str, Any], key: str) -> str:
    """Or nothing where there is no such number."""
    return "" if row.get(key) is None else f"{row[key]:.2f}"


def ratios_table(title: str, size: str, found: Iterable[dict[str, Any]], every: int) -> Table:
    """One row for each method and size of the network or batch; floors beside the figures."""
    headings = ["step", size, "ms", "floor", "/SGD", "refresh", "floor", "/SGD",
                f"mean_of_{every} /SGD", "floor /SGD"]  # fmt: skip
    rows = []
    for one in found:
        for row in one["rows"]:
            floor = {"floor": None if row.get("mean floor") is None else row["mean floor"] / one["SGD seconds"]}
            rows.append([row["step"], str(one[size]), milliseconds(row, "seconds"), milliseconds(row, "floor"),
                         ratio(row, "ratio"), milliseconds(row, "refresh seconds"), milliseconds(row, "refresh floor"),
                         ratio(row, "refresh ratio"), ratio(row, "mean ratio"), ratio(floor, "floor")])  # fmt: skip
    return results_table(title, headings, rows)


def draw(size: str, found: Sequence[dict[str, Any]], limit: float) -> Figure:
    """The mean ratio of each method against the size, and the floor of the first of ours."""
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(row["step"] for one in found for row in one["rows"] if "mean ratio" in row))
    for i, name in enumerate(names):
        points = [(one[size], row) for one in found for row in one["rows"] if row["step"] == name]
        dashes = "-" if i + 1 < len(COLOURS) else "--"
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        values = [row["mean ratio"] for _, row in points]
        axis.plot([x for x, _ in points], values, marker="o", color=colour, linestyle=dashes, label=name)
    first = [next(row for row in one["rows"] if row["step"] == names[0]) for one in found]
    floors = [row["mean floor"] / one["SGD seconds"] for one, row in zip(found, first, strict=True)]
    axis.plot([one[size] for one in found], floors, color=COLOURS[7], linestyle=":", label=f"floor of {names[0]}")
    axis.axhline(limit, color=COLOURS[0], linestyle="--", linewidth=1)
    sizes = [one[size] for one in found]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(x) for x in sizes])
    axis.minorticks_off()
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if t <= 2 * axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xlabel(f"{size} (dashed: {limit}, the limit)")
    axis.set_ylabel("time of a step / SGD step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    return figure
