"""Medians, table and picture of ``benchmarks.kfac_jax``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.common import COLOURS, results_table
from benchmarks.kfac_jax_rounds import DIGITS, DIGITS_BATCH, SGD
from benchmarks.ratio_tables import milliseconds, ratio

CLOCKS = {"wall": "", "cpu": ", processors"}
"""What is added to the names of figures."""


def rows_of(framework: str, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds after the first, of steps and of their ratios to the SGD step beside them."""
    first, *rounds = answers
    rows = []
    for name in first["seconds"]:
        row: dict[str, Any] = {"framework": framework, "step": name}
        for clock, suffix in (("seconds", CLOCKS["wall"]), ("processors", CLOCKS["cpu"])):
            seconds, of_sgd = ([one[clock][which] for one in rounds] for which in (name, SGD))
            ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(seconds, of_sgd, strict=True)]
            again = statistics.median(map(sum, seconds))
            mean = statistics.median(sum(a) / sum(b) for a, b in zip(seconds, of_sgd, strict=True))
            found = {
                "seconds": _plain(seconds), "ratio": _plain(ratios), "refresh seconds": _refresh(seconds),
                "refresh ratio": _refresh(ratios), "mean ratio": mean, "first": sum(first[clock][name]) - again,
            }  # fmt: skip
            row |= {key + suffix: value for key, value in found.items()}
        row["finite"] = all(one["finite"][name] for one in answers)
        row["rounds"] = [one["seconds"][name] for one in rounds]
        rows.append(row)
    return rows


def _plain(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.median(x for one in rounds for x in one[1:])


def _refresh(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.median(one[0] for one in rounds)


def draw(found: Sequence[dict[str, Any]], clock: str) -> Figure:
    """The mean ratio of each method against the width."""
    key = "mean ratio" + CLOCKS[clock]
    figure = Figure(figsize=(6, 4.5), dpi=150, layout="constrained")
    axis = figure.subplots()
    some = [one for one in found if one["size"] != DIGITS]
    names = dict.fromkeys((row["framework"], row["step"]) for one in some for row in one["rows"] if row["step"] != SGD)
    colours = [*COLOURS[1:], COLOURS[0]]
    for i, (framework, step) in enumerate(names):
        points = [(int(one["size"]), row[key]) for one in some for row in one["rows"]
                  if (row["framework"], row["step"]) == (framework, step)]  # fmt: skip
        dashes, colour = ("-", "--")[i // len(colours) % 2], colours[i % len(colours)]
        axis.plot(*zip(*points, strict=True), marker="o", linestyle=dashes, color=colour, label=f"{framework}: {step}")
    widths = [int(one["size"]) for one in some]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(widths, [str(x) for x in widths])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("width")
    axis.set_ylabel("mean step / SGD step of its framework")
    axis.spines[["top", "right"]].set_visible(False)
    if names:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2, frameon=False)
    return figure


def report(content: dict[str, Any], clock: str, console: Console) -> None:
    """Prints the table, what is missing in it, and what it was measured with."""
    found, described, suffix = content["measured"], content["environment"], CLOCKS[clock]
    options = described["options"]
    title = f"Three hidden layers, batch {options['batch_size']}; digits autoencoder, batch {DIGITS_BATCH}; float32"
    headings = ["framework", "step", "size", f"{clock}_ms", "/SGD", "refresh", "/SGD",
                f"mean_of_{options['every']} /SGD", "first_call [CPU_s]"]  # fmt: skip
    rows = [
        [row["framework"], row["step"], one["size"], milliseconds(row, "seconds" + suffix),
         ratio(row, "ratio" + suffix), milliseconds(row, "refresh seconds" + suffix),
         ratio(row, "refresh ratio" + suffix), ratio(row, "mean ratio" + suffix),
         f"{max(0.0, row['first' + CLOCKS['cpu']]):.1f}"]
        for one in found for row in one["rows"]
    ]  # fmt: skip
    console.print(results_table(title, headings, rows))
    for one in found:
        for name, why in one["missing"].items():
            console.print(f"{one['size']}: no {name}: {why}", highlight=False)
        for row in one["rows"]:
            if not row["finite"]:
                console.print(f"{one['size']}: {row['step']} of {row['framework']} diverged", highlight=False)
    console.print(
        "first call: what the first steps, to the second refresh, take beyond as many later ones", highlight=False
    )
    console.print(described)
