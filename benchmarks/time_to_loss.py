"""Training loss against steps and seconds: nine problems, low-rank K-FAC and its rivals.

python -m benchmarks.time_to_loss --problem digits_autoencoder --grid
python -m benchmarks.time_to_loss --problem digits_autoencoder --seeds 3 --again
python -m benchmarks.time_to_loss --problem digits_autoencoder --report

The first tries every method's grid of eight settings, the second trains from three seeds by the best of them
and measures time, all methods in turn in one process, the third shows what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optree
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import lrkfac
from benchmarks.common import RESULTS, environment, save_figure, written
from benchmarks.methods import METHODS, Settings
from benchmarks.problem import Problem
from benchmarks.problems import PROBLEMS, TAKE_DATA
from benchmarks.runs import Results, Run, train
from benchmarks.time_to_loss_report import draw, grid_table, table
from benchmarks.trainers import Setup
from examples.report import positive

MODULE = "benchmarks.time_to_loss"


def made_problem(arguments: argparse.Namespace, device: torch.device) -> Problem:
    """The problem with the command line's sizes in place of its own, its data on the device."""
    problem = PROBLEMS[arguments.problem](arguments.data, arguments.activation)
    data = {name: getattr(problem, name) for name in ("inputs", "targets", "test_inputs", "test_targets", "buffers")}
    return dataclasses.replace(
        problem,
        **{name: optree.tree_map(lambda x: x.to(device), x) for name, x in data.items() if x is not None},
        batch_size=arguments.batch_size or problem.batch_size,
        steps=arguments.steps or problem.steps,
    )


def results_path(arguments: argparse.Namespace, problem: Problem, steps: int) -> Path:
    """One file for what is compared: the same work on the same device."""
    parts = ["time_to_loss", arguments.problem]
    parts += [arguments.activation] * (arguments.problem == "deep_autoencoder")
    if arguments.problem in TAKE_DATA:
        without = "python" if arguments.problem == "gpt" else "enlarged_digits"
        parts.append(arguments.data.resolve().name if arguments.data else without)
    parts += [f"batch{problem.batch_size}", f"steps{steps}", arguments.device]
    return arguments.output / ("-".join(parts + ["compiled"] * arguments.compile) + ".json")


def rounds(arguments: argparse.Namespace, results: Results, tuned: Results) -> Iterator[list[Run]]:
    """The runs to be made, in rounds of one per method (and rank), which then train in turn.

    Without ``--grid``, each method has its best settings of ``tuned``.
    """
    whole = range(max(len(METHODS[name].grid) for name in arguments.method))
    numbers = (arguments.only or whole) if arguments.grid else [0]
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for i in numbers:
            runs = []
            for name in arguments.method:
                grid = METHODS[name].grid
                for rank in arguments.rank if METHODS[name].ranked else [None]:
                    if arguments.grid and i < len(grid):
                        runs.append(Run(name, with_rank(name, grid[i], rank, arguments.refresh), seed))
                    elif not arguments.grid:
                        best = tuned.best(name, rank)
                        chosen = (
                            best[0].settings
                            if best
                            else with_rank(name, METHODS[name].settings, rank, arguments.refresh)
                        )
                        runs.append(Run(name, chosen, seed))
            yield [run for run in runs if arguments.again or run.key not in results.runs]


def with_rank(name: str, settings: Settings, rank: int | None, refresh: int) -> Settings:
    """The settings of a run: those of K-FAC say the steps between statistics, and the rank."""
    if not METHODS[name].curvature:
        return settings
    return {**settings, "refresh": refresh, **({} if rank is None else {"rank": rank})}


def perform(
    runs: list[Run], problem: Problem, arguments: argparse.Namespace, device: torch.device, progress: Progress
) -> None:
    """Trains all runs in turn, a point of the curve at a time."""
    going = []
    torch.compiler.reset()  # what was compiled for earlier runs
    for run in runs:
        params = optree.tree_map(lambda leaf: leaf.to(device), problem.init(run.seed))
        layers = lrkfac.find_layers(problem.model, params, problem.argument(problem.inputs[:2]))
        rank, refresh = run.settings.get("rank", 1), run.settings.get("refresh", 1)
        setup = Setup(problem, params, layers, run.seed, problem.steps, rank, refresh, arguments.compile)
        own = {name: value for name, value in run.settings.items() if name not in ("rank", "refresh")}
        trainer = METHODS[run.method].make(setup, own)
        bar = progress.add_task(METHODS[run.method].label, total=problem.steps, loss="")
        training = train(problem, trainer, run, problem.batch_size, problem.steps, arguments.points, device)
        going.append((run, bar, training))
    while going:
        left = []
        for run, bar, training in going:
            done = next(training, None)
            if done is None:
                progress.remove_task(bar)
                continue
            progress.update(bar, advance=done, loss="diverged" if run.diverged else f"{run.loss[-1]:.4g}", refresh=True)
            left.append((run, bar, training))
        going = left


def main() -> None:
    """Runs the benchmark."""
    arguments = _arguments()
    console = Console(width=max(Console().width, 132))
    device = torch.device(arguments.device)
    torch._dynamo.config.recompile_limit = 100  # the step of every method and rank is one function to the compiler
    described = environment(arguments.threads, device, packages=["pytorch-optimizer"])
    problem = made_problem(arguments, device)
    results = Results(results_path(arguments, problem, problem.steps))
    tuned = Results(results_path(arguments, problem, arguments.tuned_at)) if arguments.tuned_at else results
    console.print(problem.title, highlight=False)
    for name in [name for name in arguments.method if METHODS[name].missing]:
        console.print(f"not run: {METHODS[name].label}: {METHODS[name].missing}", highlight=False)
        arguments.method.remove(name)

    if not arguments.report:
        command = " ".join(["python", "-m", MODULE, *sys.argv[1:]])
        described |= {"data": problem.title, "command": command, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        columns = (TextColumn("{task.description:<26}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                   TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"))  # fmt: skip
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            for runs in rounds(arguments, results, tuned):
                perform(runs, problem, arguments, device, progress)
                if runs:
                    results.add(runs, described)
                    results.write()
    if not results.runs:
        console.print("no runs yet")
        return
    if arguments.grid:
        console.print(grid_table(results))
    console.print(table(problem, results))
    written(results.path, console)
    save_figure(results.path.with_suffix(".png"), draw(problem, results), console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--problem", choices=list(PROBLEMS), required=True, help="of " + ", ".join(PROBLEMS), metavar="NAME")
    add("--method", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME",
        help="methods to run, of " + ", ".join(METHODS) + " (default: all)")  # fmt: skip
    add("--grid", action="store_true", help="run, and show, all settings of each method's grid, not the best alone")
    add("--only", nargs="+", type=int, metavar="I", help="of the grid, only the settings of these numbers, from 0")
    add("--again", action="store_true", help="run what the results have already, and replace it")
    add("--report", action="store_true", help="run nothing, show the results")
    add("--seed", type=int, default=0, metavar="S", help="first seed, of start, batches and noise (default: 0)")
    add("--seeds", type=positive, default=1, metavar="N", help="number of seeds (default: 1)")
    add("--steps", type=positive, metavar="N", help="training steps (default: the problem's)")
    add(
        "--tuned-at",
        type=positive,
        metavar="N",
        help="steps of the runs whose best settings are taken (default: the same)",
    )
    add("--batch-size", type=positive, metavar="N", help="examples per step (default: the problem's)")
    add("--points", type=positive, default=50, metavar="N", help="points of a curve (default: 50)")
    add("--rank", type=positive, nargs="+", default=[16], metavar="R", help="ranks of low-rank K-FAC (default: 16)")
    add("--refresh", type=positive, default=5, metavar="K", help="steps between K-FAC's statistics (default: 5)")
    add("--compile", action="store_true", help="compile K-FAC's whole step, and the loss of the others")
    of_data = f"images, or text, of {', '.join(TAKE_DATA)}; see benchmarks/get_data"
    add("--data", type=Path, metavar="DIR", help=of_data)
    add("--activation", choices=["relu", "tanh"], default="relu", help="of the deep autoencoder (default: relu)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    add(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder of the results (default: benchmarks/results)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
