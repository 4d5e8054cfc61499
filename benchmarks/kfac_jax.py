"""Time of training steps of kfac-jax and of lrkfac, each beside an SGD step of its own framework, by width.

python -m benchmarks.kfac_jax
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.common import (
    COLOURS,
    argument_parser,
    command_of,
    environment,
    results_table,
    wide_console,
    write_json,
    write_results,
)
from benchmarks.kfac_jax_rounds import COMPILED, DIGITS, DIGITS_BATCH, EAGER, JAX, SGD
from benchmarks.kfac_jax_rounds import MODULE as CHILD
from benchmarks.ratio_tables import milliseconds, ratio

MODULE = "benchmarks.kfac_jax"
PACKAGES = ("jax", "jaxlib", "kfac-jax", "asdfghjkl", "curvlinops-for-pytorch")
INSTALL = "pip install jax git+https://github.com/google-deepmind/kfac-jax"
MISSING = "" if find_spec("jax") and find_spec("kfac_jax") else f"needs jax and kfac-jax: {INSTALL}"


class Child:
    """A process that trains in one framework, and waits between rounds."""

    def __init__(self, framework: str, size: str, arguments: Namespace) -> None:
        settings = {"framework": framework, "size": size, **{
            name: getattr(arguments, name) for name in ("batch_size", "rank", "every", "device", "threads")
        }}  # fmt: skip
        # So that code is made in this process and its children, whose processors' time counts, and never found.
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        variables["NPROC"] = str(arguments.threads)  # for XLA, which takes all processors otherwise
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", CHILD, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env={**os.environ, **variables},
        )  # fmt: skip

    def round(self) -> dict[str, Any]:
        """Has it train to the next refresh."""
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the process stopped with code {self._process.wait()}: {self._errors.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Lets it end."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def measured(size: str, arguments: Namespace) -> dict[str, Any]:
    """The rows of each framework, whose processes take rounds in turn, one at a time; wide networks take fewer."""
    frameworks = [JAX, EAGER, *([COMPILED] if size in arguments.compile else [])]
    repeats = arguments.repeats if size == DIGITS else max(2, arguments.repeats * 512 // max(512, int(size)))
    children: dict[str, Child] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in frameworks}
    try:
        children |= {name: Child(name, size, arguments) for name in frameworks}
        order = list(frameworks)
        for _ in range(1 + repeats):
            for name in order:
                answers[name].append(children[name].round())
            order = order[1:] + order[:1]
    finally:
        for child in children.values():
            child.close()
    rows = [row for name in frameworks for row in rows_of(name, answers[name])]
    return {"size": size, "rows": rows, "missing": answers[EAGER][0]["missing"]}


def rows_of(framework: str, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds after the first, of steps and of their ratios to the SGD step beside them."""
    first, *rounds = answers
    rows = []
    for name in first["seconds"]:
        row: dict[str, Any] = {"framework": framework, "step": name}
        for clock, suffix in (("seconds", ""), ("processors", ", processors")):
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


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """The mean ratio of each method against the width."""
    figure = Figure(figsize=(6, 4.5), dpi=150, layout="constrained")
    axis = figure.subplots()
    some = [one for one in found if one["size"] != DIGITS]
    names = dict.fromkeys((row["framework"], row["step"]) for one in some for row in one["rows"] if row["step"] != SGD)
    colours = [*COLOURS[1:], COLOURS[0]]
    for i, (framework, step) in enumerate(names):
        points = [(int(one["size"]), row["mean ratio"]) for one in some for row in one["rows"]
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
    axis.set_ylabel("mean time of a step / SGD step of the framework")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2, frameon=False)
    return figure


def commit(package: str) -> str:
    """Which commit is installed, where that is known: a repository may call itself by the version last released."""
    try:
        text = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    return json.loads(text or "{}").get("vcs_info", {}).get("commit_id", "unknown")


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    sizes = ["512", "1024", "2048", DIGITS]
    add("--sizes", nargs="+", default=sizes, metavar="D", help="widths of the hidden layers, or digits")
    add("--batch-size", type=int, default=128, metavar="N", help="examples per batch of a perceptron")
    add("--rank", type=int, default=32, metavar="R", help="of our factors")
    add("--every", type=int, default=10, metavar="K", help="steps per refresh")
    add("--repeats", type=int, default=5, metavar="N", help="rounds of so many steps that are timed up to width 512")
    add("--compile", nargs="+", default=[], metavar="D", help="of the sizes, those with our steps compiled as well")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        if size != DIGITS and not size.isdecimal():
            parser.error(f"--sizes: expected widths or {DIGITS}, got {size}")
    if MISSING:
        sys.exit(MISSING)
    device = torch.device(arguments.device)
    described = environment(arguments.threads, device, PACKAGES) | command_of(MODULE, vars(arguments))
    described["commit of kfac-jax"] = commit("kfac-jax")
    console, found = wide_console(), []
    path = arguments.output / f"kfac_jax_{device.type}.json"
    content = {"environment": described, "measured": found}
    for size in arguments.sizes:
        with console.status(f"measuring {size}"):
            found.append(measured(size, arguments))
        write_json(path, content)  # what there is, should the rest be interrupted
    title = f"Three hidden layers, batch {arguments.batch_size}; digits autoencoder, batch {DIGITS_BATCH}; float32"
    headings = ["framework", "step", "size", "ms", "/SGD", "refresh", "/SGD", f"mean_of_{arguments.every} /SGD",
                "CPU_s /SGD", "first_call [CPU_s]"]  # fmt: skip
    rows = [
        [row["framework"], row["step"], one["size"], milliseconds(row, "seconds"), ratio(row, "ratio"),
         milliseconds(row, "refresh seconds"), ratio(row, "refresh ratio"), ratio(row, "mean ratio"),
         ratio(row, "mean ratio, processors"), f"{max(0.0, row['first, processors']):.1f}"]
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
        "CPU s: the mean by seconds of processors, which other work on the machine disturbs less; first call: what the "
        "first steps, to the second refresh, take beyond as many later ones"
    )
    console.print(described)
    write_results(path, content, draw(found), console)


if __name__ == "__main__":
    main()
