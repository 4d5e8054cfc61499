"""Table and picture of the runs of ``time_to_loss``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.table import Table

from benchmarks.common import results_table
from benchmarks.methods import METHODS
from benchmarks.problem import Problem
from benchmarks.runs import Results, Run


class Line(NamedTuple):
    """One line of the table: a method (with its rank), and its runs of all seeds under its best settings."""

    method: str
    label: str
    runs: Sequence[Run]

    @property
    def loss(self) -> float:
        """The median over seeds of the final loss."""
        return statistics.median(run.final_loss for run in self.runs)

    def reaches(self, target: float) -> tuple[float, float]:
        """Steps and seconds until the median curve is at most ``target``; infinite if it never is."""
        steps, seconds, loss = median_curve(self.runs)
        i = next((i for i, value in enumerate(loss) if value <= target), None)
        if i is None:
            return math.inf, math.inf
        share = (loss[i - 1] - target) / (loss[i - 1] - loss[i]) if i else 1.0
        return tuple(x[max(i - 1, 0)] + share * (x[i] - x[max(i - 1, 0)]) for x in (steps, seconds))


def lines(results: Results) -> list[Line]:
    """Those of all methods that ran."""
    found = []
    for name, method in METHODS.items():
        ranks: list[Any] = [None]
        if method.ranked:
            ranks = sorted({run.settings["rank"] for run in results.runs.values() if run.method == name})
        for rank in ranks:
            if runs := results.best(name, rank):
                found.append(Line(name, method.label if rank is None else f"{method.label}, rank {rank}", runs))
    return found


def target_loss(problem: Problem, found: Sequence[Line]) -> float:
    """The problem's own target, else what the best rival has at the end."""
    if problem.target is not None:
        return problem.target
    rivals = [line.loss for line in found if not METHODS[line.method].ours]
    return min(rivals or [line.loss for line in found])


def at_edge(results: Results, line: Line) -> bool:
    """Whether the best of at least three learning rates, or dampings, is the largest or the smallest tried."""
    chosen = line.runs[0].settings
    for name in ("learning_rate", "relative_rate", "damping"):
        tried = {run.settings[name] for run in results.runs.values()
                 if run.method == line.method and name in run.settings}  # fmt: skip
        if name in chosen and len(tried) > 2 and chosen[name] in (min(tried), max(tried)):
            return True
    return False


def settings_text(settings: Mapping[str, Any]) -> str:
    """Short: ``rate 0.01, cosine``."""
    short = {"learning_rate": "rate ", "relative_rate": "rate ", "kl_clip": "clip ", "schedule": ""}
    parts = []
    for name, value in settings.items():
        prefix = short.get(name, f"{name} ")
        if name not in ("rank", "refresh"):
            parts.append(f"{prefix}{value:g}" if isinstance(value, float) else f"{prefix}{value}")
    return ", ".join(parts) or "none"


def table(problem: Problem, results: Results) -> Table:
    """Methods by rows, medians over seeds."""
    found = lines(results)
    target = target_loss(problem, found)
    rows = []
    for line in found:
        last_steps = statistics.median(run.steps[-1] for run in line.runs)
        seconds = statistics.median(run.seconds[-1] for run in line.runs)
        to_target = line.reaches(target)
        tried = sum(run.method == line.method for run in results.runs.values())
        accuracy = [f"{statistics.median(run.accuracy[-1] for run in line.runs):.4f}"] if line.runs[0].accuracy else []
        rows.append([
            line.label,
            settings_text(line.runs[0].settings) + (" (edge)" if at_edge(results, line) else ""),
            str(tried),
            str(len(line.runs)),
            f"{line.loss:.5g}",
            *accuracy,
            f"{to_target[0]:.0f}" if math.isfinite(to_target[0]) else "never",
            f"{to_target[1]:.2f}" if math.isfinite(to_target[1]) else "never",
            f"{1000 * seconds / max(last_steps, 1):.2f}",
            f"{line.runs[0].state_bytes:,}",
        ])  # fmt: skip
    tested = ["test accuracy"] if found and found[0].runs[0].accuracy else []
    headings = ["method", "best settings", "runs", "seeds", "final loss", *tested, f"steps to {target:.5g}",
                f"seconds to {target:.5g}", "ms per step", "state bytes"]  # fmt: skip
    return results_table(problem.title, headings, rows)


def grid_table(results: Results) -> Table:
    """The final loss under every setting that ran, medians over seeds, the best first."""
    rows = []
    for name, method in METHODS.items():
        by_settings: dict[str, list[Run]] = {}
        for run in results.runs.values():
            if run.method == name:
                by_settings.setdefault(run.key.settings, []).append(run)
        tried = [Line(name, method.label, runs) for runs in by_settings.values()]
        for i, line in enumerate(sorted(tried, key=lambda line: line.loss)):
            settings = settings_text(line.runs[0].settings)
            rows.append(["" if i else line.label, settings, str(len(line.runs)), f"{line.loss:.5g}"])
    return results_table("All settings", ["method", "settings", "seeds", "final loss"], rows)


def median_curve(runs: Sequence[Run]) -> tuple[list[float], list[float], list[float]]:
    """Steps, seconds and loss, point by point the median over seeds, as far as every seed got."""
    length = min(len(run.steps) for run in runs)
    columns = ([getattr(run, name)[:length] for run in runs] for name in ("steps", "seconds", "loss"))
    return tuple([statistics.median(values) for values in zip(*column, strict=True)] for column in columns)


def draw(problem: Problem, results: Results) -> Figure:
    """Loss against steps on the left and against seconds on the right, log scale above the floor."""
    figure = Figure(figsize=(11, 5.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    found = lines(results)
    for line in found:
        style = METHODS[line.method]
        steps, seconds, loss = median_curve(line.runs)
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.plot(x, np.array(loss) - problem.floor, label=line.label, color=style.colour, linestyle=style.dashes,
                linewidth=2.4 if style.ours else 1.5)  # fmt: skip
    gaps = np.concatenate([median_curve(line.runs)[2] for line in found]) - problem.floor
    drawn = gaps[gaps > 0]  # a loss may round to its lower bound
    rounded = {float(f"{gap + problem.floor:.3g}") for gap in np.geomspace(drawn.min(), drawn.max(), 10)}
    ticks = sorted(value - problem.floor for value in rounded if value > problem.floor)
    for axis, label in zip(axes, ("steps", "training time [s], evaluation not counted"), strict=True):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y + problem.floor:.3g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(label)
        axis.margins(x=0)
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    above = f", log scale above its lower bound {problem.floor:.2f}" if problem.floor else ""
    axes[0].set_ylabel(f"training loss [nats]{above}")
    figure.suptitle(problem.title, x=0.01, ha="left", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
