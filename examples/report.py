"""Arguments, progress bar, tables, picture and CSV of a comparison."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatterSciNotation, LogLocator, NullLocator
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.common import Method, Metric, Point, Problem, Run

Runs = Mapping[str, Sequence[Run]]
"""For each method one run per seed."""


def positive(text: str) -> int:
    """An integer ≥ 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


def save_table(table: Table, path: Path) -> None:
    """Writes headings, rows and caption of a table as they are shown, and with which versions, as JSON."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    content = {
        "headings": [str(column.header).replace("\n", " ") for column in table.columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "caption": str(table.caption or ""),
        "versions": {name: version(name) for name in ("lrkfac", "torch")},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def progress_bar(console: Console) -> Progress:
    """A bar per task that shows its field ``loss``; drawn on request only, so that it disturbs no clock."""
    return Progress(
        TextColumn("{task.description:<23}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]}"),
        console=console,
        auto_refresh=False,
    )


def median_loss(runs: Sequence[Run]) -> float:
    """The median over seeds of the last training loss."""
    return statistics.median(run.final_loss for run in runs)


def median_curve(runs: Sequence[Run]) -> list[Point]:
    """Point by point the median over seeds, as far as every seed got."""
    curve = []
    for points in zip(*(run.points for run in runs), strict=False):
        values = zip(*(point.values for point in points), strict=True)
        seconds = statistics.median(point.seconds for point in points)
        curve.append(Point(points[0].step, seconds, tuple(statistics.median(v) for v in values)))
    return curve


def results_table(problem: Problem, methods: Mapping[str, Method], runs: Runs) -> Table:
    """Method, steps, seconds of the processor, metrics, bytes of optimizer state: medians over seeds."""
    table = Table(title=problem.title, title_justify="left", box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("steps", "seconds", "ms/step", *(m.name for m in problem.metrics), "state [bytes]"):
        table.add_column(escape(heading.replace(" ", "\n")), justify="right", no_wrap=True)
    for name, of_seeds in runs.items():
        last = median_curve(of_seeds)[-1]
        table.add_row(
            methods[name].style.label,
            f"{last.step}",
            f"{last.seconds:.2f}",
            f"{1000 * last.seconds / max(last.step, 1):.2f}",
            *(metric.form.format(value) for metric, value in zip(problem.metrics, last.values, strict=True)),
            f"{of_seeds[0].state_bytes:,}",
        )
    return table


def grid_table(
    problem: Problem, methods: Mapping[str, Method], runs: Mapping[tuple[str, float], Sequence[Run]]
) -> Table:
    """The last training loss at every learning rate of the grid, medians over seeds; the best is marked."""
    table = Table(
        title="last training loss (*: best) under each learning rate",
        title_justify="left",
        show_header=False,
        box=SIMPLE,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    form = problem.metrics[0].form
    for name, method in methods.items():
        losses = {rate: median_loss(runs[name, rate]) for rate in method.learning_rates}
        best = min(losses, key=losses.__getitem__)
        cells = [f"{rate:g}\n{form.format(loss)}{' *' if rate == best else ''}" for rate, loss in losses.items()]
        table.add_row(method.style.label, *cells, end_section=True)
    return table


def write_csv(path: Path, problem: Problem, runs: Runs, first_seed: int) -> None:
    """One line per method, seed and point."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "step", "seconds", *(m.name for m in problem.metrics)])
        for name, of_seeds in runs.items():
            for seed, run in enumerate(of_seeds, first_seed):
                for point in run.points:
                    values = (f"{value:.6g}" for value in point.values)
                    writer.writerow([name, seed, point.step, f"{point.seconds:.4f}", *values])


def draw(path: Path, problem: Problem, subtitle: str, methods: Mapping[str, Method], runs: Runs) -> None:
    """One row of panels per metric: against steps on the left, against seconds on the right."""
    rows = len(problem.metrics)
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10}):
        figure = Figure(figsize=(10, 1.3 + 3.1 * rows), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
        axes = figure.subplots(rows, 2, sharey="row", sharex="col", squeeze=False)
        for metric_index, metric in enumerate(problem.metrics):
            for column, axis in enumerate(axes[metric_index]):
                for name, of_seeds in runs.items():
                    _draw_curve(axis, methods[name], median_curve(of_seeds), metric_index, column)
                _format_axis(axis, metric)
            axes[metric_index, 0].set_ylabel(metric.label)
            axes[metric_index, 1].tick_params(axis="y", which="both", left=False)
        axes[-1, 0].set_xlabel("steps")
        axes[-1, 1].set_xlabel("processor's time [s], evaluation not counted")
        figure.suptitle(f"{problem.title}\n{subtitle}", x=0.01, ha="left", fontsize=11)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path)


def _draw_curve(axis: Axes, method: Method, curve: Sequence[Point], metric: int, column: int) -> None:
    style = method.style
    axis.plot(
        [point.seconds if column else point.step for point in curve],
        [point.values[metric] for point in curve],
        label=style.label,
        color=style.colour,
        linestyle=style.dashes,
        linewidth=style.width,
    )


def _format_axis(axis: Axes, metric: Metric) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(x=0)
    if metric.floor is not None:
        # Logarithmic in what can still be gained, labelled with the loss itself.
        floor = metric.floor
        axis.set_yscale(
            "function",
            functions=(lambda y: np.log(np.maximum(y - floor, 1e-6)), lambda z: np.exp(z) + floor),
        )
    elif metric.logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=12))
        axis.yaxis.set_major_formatter(LogFormatterSciNotation())
    if metric.ticks:
        axis.yaxis.set_major_locator(FixedLocator(metric.ticks))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(metric.ticks[0], metric.ticks[-1])
