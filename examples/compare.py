"""The command line of an example: trains by every method, shows the table, writes picture and CSV."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from examples.common import Method, Options, Point, Problem, Run, train
from examples.report import draw, grid_table, median_loss, positive, progress_bar, results_table, write_csv


class Result(NamedTuple):
    """Each method's runs at its best learning rate, and where output goes."""

    runs: dict[str, list[Run]]
    folder: Path
    console: Console


def compare(
    problem: Problem,
    methods: Mapping[str, Method],
    description: str,
    defaults: Options,
    arguments: Sequence[str] | None = None,
) -> Result:
    """Run the example with the options of the command line, or with ``arguments``."""
    settings = _parser(problem.name, methods, description, defaults).parse_args(arguments)
    torch.set_num_threads(settings.threads)
    options = Options(settings.steps, settings.batch_size, settings.refresh)
    methods = {name: methods[name] for name in methods if name in settings.methods}
    seeds = range(settings.seed, settings.seed + settings.seeds)
    console = Console()

    runs: dict[tuple[str, float], list[Run]] = {}
    with progress_bar(console) as progress:
        for name, method in methods.items():
            rates = method.learning_rates if settings.grid else (method.learning_rate,)
            tasks = [(rate, seed) for rate in rates for seed in seeds]
            bar = progress.add_task(method.style.label, total=options.steps * len(tasks), loss="")
            for done, (rate, seed) in enumerate(tasks):
                report = _reporter(progress, bar, done * options.steps, problem)
                runs.setdefault((name, rate), []).append(train(problem, method, rate, seed, options, report))
            progress.update(bar, completed=options.steps * len(tasks), refresh=True)

    if settings.grid:
        console.print(grid_table(problem, methods, runs))
    best: dict[str, list[Run]] = {}
    for (name, _), of_seeds in runs.items():
        if name not in best or median_loss(of_seeds) < median_loss(best[name]):
            best[name] = of_seeds
    console.print(results_table(problem, methods, best))

    settings.output.mkdir(parents=True, exist_ok=True)
    picture, table = (settings.output / f"{problem.name}.{suffix}" for suffix in ("png", "csv"))
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"median of seeds {seeds[0]} to {seeds[-1]}"
    draw(
        picture,
        problem,
        f"{len(problem.inputs)} {problem.examples}, batch {options.batch_size}, {which}",
        methods,
        best,
    )
    write_csv(table, problem, best, settings.seed)
    console.print(f"wrote {picture} and {table}", highlight=False, soft_wrap=True)
    return Result(best, settings.output, console)


def _reporter(progress: Progress, bar: TaskID, done: int, problem: Problem) -> Callable[[Point], None]:
    form = problem.metrics[0].form

    def report(point: Point) -> None:
        progress.update(bar, completed=done + point.step, loss=form.format(point.values[0]), refresh=True)

    return report


def _parser(name: str, methods: Mapping[str, Method], description: str, defaults: Options) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=description)
    add = parser.add_argument
    add(
        "--steps",
        type=positive,
        default=defaults.steps,
        metavar="N",
        help="training steps (default: %(default)s)",
    )
    add("--batch-size", type=positive, default=defaults.batch_size, metavar="N",
        help="examples per step, drawn with replacement (default: %(default)s)")  # fmt: skip
    add("--methods", nargs="+", choices=list(methods), default=list(methods), metavar="NAME",
        help="methods to compare, of " + ", ".join(methods) + " (default: all)")  # fmt: skip
    add("--refresh", type=positive, default=defaults.refresh, metavar="K",
        help="take K-FAC statistics every K steps (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S",
        help="first seed, of weights, batches and sampled labels (default: %(default)s)")  # fmt: skip
    add("--seeds", type=positive, default=1, metavar="N",
        help="train from N consecutive seeds and show the median (default: %(default)s)")  # fmt: skip
    add("--grid", action="store_true",
        help="try five learning rates for every method and continue with the best")  # fmt: skip
    add("--threads", type=positive, default=1, metavar="N",
        help="CPU threads; one is fastest for layers this small (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, default=Path("examples/output"), metavar="DIR",
        help="folder for the picture and the CSV (default: %(default)s)")  # fmt: skip
    return parser
