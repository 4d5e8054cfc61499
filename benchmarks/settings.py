"""One setting for all problems: low-rank K-FAC's defaults, and what changing one of them does, in short runs.

python -m benchmarks.settings
python -m benchmarks.settings --problem fashion_cnn --data DIR
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lrkfac
from benchmarks.common import RESULTS, environment, results_table, write_json, written
from benchmarks.methods import KFAC_LEARNING_RATE
from benchmarks.problem import Problem
from benchmarks.problems import PROBLEMS, TAKE_DATA
from benchmarks.trainers import Functional, Setup
from examples.report import positive

STEPS = {"digits_autoencoder": 300, "digits_classifier": 150, "digits_cnn": 100, "regression": 300, "fashion_cnn": 468}
RANK = 16
START = {"damping": 0.03, "kl_clip": 1e-3, "decay": 0.95, "momentum": 0.9, "refresh": 5, "schedule": "constant"}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"damping": 0.01, "kl_clip": 1e-2},
    {"damping": 0.01},
    {"damping": 0.1},
    {"damping": 0.1, "refresh": 10},
    {"damping": 0.1, "refresh": 10, "kl_clip": 3e-4},
    {"damping": 0.1, "refresh": 10, "schedule": "cosine"},
    {"damping": 0.1, "refresh": 10, "schedule": "cosine", "kl_clip": 3e-4},
    {"kl_clip": 3e-3},
    {"decay": 0.8},
    {"refresh": 10},
    {"kl_clip": 3e-4, "momentum": 0.95},
    {"learning_rate": 0.3},
    {"damping": 0.01, "refresh": 10, "schedule": "cosine"},
    {"refresh": 10, "schedule": "cosine"},
)
"""What differs from ``START``."""


def trained(problem: Problem, settings: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """The loss at the end of a run, and the accuracy on test examples where there are such."""
    options = dict(settings)
    rate, refresh = options.pop("learning_rate", KFAC_LEARNING_RATE), options.pop("refresh")
    if options.pop("schedule") == "cosine":
        rate = lrkfac.schedules.warmup_cosine_decay_schedule(rate, rate, 0, steps)
    params = problem.init(seed)
    layers = lrkfac.find_layers(problem.model, params, problem.argument(problem.inputs[:2]))
    setup = Setup(problem, params, layers, seed, steps, RANK, refresh, compiled=False)
    trainer = Functional(setup, lrkfac.low_rank_kfac(layers, rate, rank=RANK, **options))
    batches = problem.batches(problem.batch_size, seed)
    for _ in range(steps):
        batch = next(batches)
        trainer.step(problem.inputs[batch], problem.targets[batch])
    judged = trainer.params(), trainer.buffers()
    loss, accuracy = problem.loss(*judged), problem.accuracy(*judged)
    return {"loss": loss if math.isfinite(loss) else None} | ({} if accuracy is None else {"accuracy": accuracy})


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settings", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    names = [name for name in STEPS if name not in TAKE_DATA]
    add("--problem", nargs="+", choices=list(STEPS), default=names, metavar="NAME", help="of " + ", ".join(STEPS))
    add("--data", type=Path, metavar="DIR", help="images of fashion_cnn; see benchmarks/get_data")
    add("--change", nargs="+", type=int, metavar="I", help="only the changes of these numbers, from 0 (nothing)")
    add("--steps", type=positive, metavar="N", help="training steps (default: " + str(STEPS) + ")")
    add("--seed", type=int, default=0, metavar="S", help="of start, batches and noise (default: 0)")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    console, path = Console(width=132), arguments.output / "settings_cpu.json"
    where = environment(1, torch.device("cpu")) | {"command": " ".join(sys.argv[1:])}
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for name in arguments.problem:
        problem = PROBLEMS[name](arguments.data, "relu")
        for i in arguments.change or range(len(CHANGES)):
            steps = arguments.steps or STEPS[name]
            what = {"problem": name, "steps": steps, "seed": arguments.seed, "change": CHANGES[i]}
            runs = [run for run in runs if {key: run[key] for key in what} != what]
            runs.append(what | trained(problem, START | CHANGES[i], steps, arguments.seed))
            write_json(path, {"start": START | {"rank": RANK}, "environment": where, "runs": runs})
    console.print(table(runs))
    written(path, console)


def table(runs: list[dict[str, Any]]) -> Any:
    """Changes by rows, problems by columns: the loss, or the accuracy on test examples."""
    names = [name for name in STEPS if any(run["problem"] == name for run in runs)]
    rows = []
    for change in CHANGES:
        of_change = {run["problem"]: run for run in runs if run["change"] == change}
        cells = [of_change.get(name, {}) for name in names]
        text = ", ".join(f"{name} {value}" for name, value in change.items()) or "none"
        rows.append([text, *(f"{cell.get('accuracy', cell['loss']):.4g}" if cell else "" for cell in cells)])
    title = f"Changes from {START}, rank {RANK}: loss, or accuracy on test images"
    return results_table(title, ["change", *(name.replace("_", " ") for name in names)], rows)


if __name__ == "__main__":
    main()
