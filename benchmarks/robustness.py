"""Whether a chain without a learning rate ever diverges: random seeds, ranks, batch sizes, dampings.

python -m benchmarks.robustness
python -m benchmarks.robustness --chain spectral
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import optree
import torch
from rich.console import Console
from rich.progress import track

import lrkfac
from benchmarks.common import RESULTS, environment, results_table, write_json, written
from benchmarks.problems import PROBLEMS

SEEDS = range(10)
RANKS = (1, 2, 4, 16, 64)
BATCH_SIZES = (16, 32, 64, 256, 750, 1500)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
REFRESHES = (1, 5, 20)
CHAINS = {"adaptive": lrkfac.adaptive_low_rank_kfac, "spectral": lrkfac.spectral_kfac}


def trained(
    seed: int, rank: int, batch_size: int, damping: float, refresh: int, steps: int, chain: str = "adaptive"
) -> dict[str, Any]:
    """One run on the digits autoencoder: its losses, and whether all that it left behind is finite."""
    problem = PROBLEMS["digits_autoencoder"](None, "tanh")
    params = problem.init(seed)
    layers = lrkfac.find_layers(problem.model, params, problem.inputs[:2])
    evaluate = lrkfac.evaluator(problem.model, problem.likelihood, layers)
    tx = CHAINS[chain](layers, rank=rank, damping=damping)
    state, losses = tx.init(params), [problem.loss(params)]
    torch.manual_seed(seed)
    batches = problem.batches(batch_size, seed)
    for step in range(steps):
        batch = next(batches)
        evaluation = evaluate(params, problem.inputs[batch], problem.targets[batch], statistics=step % refresh == 0)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
        if (step + 1) % max(1, steps // 10) == 0:
            losses.append(problem.loss(params))
    rejected = next(int(link.rejected) for link in state if hasattr(link, "rejected"))
    finite = all(bool(x.isfinite().all()) for x in optree.tree_leaves((params, state)))
    settings = {"seed": seed, "rank": rank, "batch size": batch_size, "damping": damping, "refresh": refresh}
    return {**settings, "losses": losses, "finite": finite, "rejected": rejected}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of each (default: %(default)s)")
    parser.add_argument("--chain", choices=list(CHAINS), default="adaptive", help="which (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console()
    where = environment(1, torch.device("cpu"))
    combinations = list(itertools.product(SEEDS, RANKS, BATCH_SIZES, DAMPINGS, REFRESHES))
    chosen = random.Random(0).sample(combinations, arguments.runs)
    runs = [
        trained(*c, arguments.steps, arguments.chain)
        for c in track(chosen, "training", console=console, transient=True)
    ]
    worst = sorted(runs, key=lambda run: max(run["losses"]) / run["losses"][0], reverse=True)
    highest = max(run["losses"][-1] / run["losses"][0] for run in runs)
    rows = [
        ("runs", str(len(runs))),
        ("not finite", str(sum(not run["finite"] for run in runs))),
        ("highest loss on the way / at the start", f"{max(worst[0]['losses']) / worst[0]['losses'][0]:.4f}"),
        ("highest loss at the end / at the start", f"{highest:.4f}"),
        ("steps undone", str(sum(run["rejected"] for run in runs))),
    ]
    console.print(results_table(f"{arguments.steps} steps on the digits autoencoder", ("what", "value"), rows))
    name = "robustness" if arguments.chain == "adaptive" else f"robustness_{arguments.chain}"
    path = arguments.output / f"{name}_cpu.json"
    command = f"python -m benchmarks.robustness --chain {arguments.chain}"
    write_json(path, {"command": command, "environment": where, "runs": runs})
    written(path, console)


if __name__ == "__main__":
    main()
