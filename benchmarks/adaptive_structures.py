"""The adaptive chain with other structures of its factors: what low rank loses to dense, and through which side.

python -m benchmarks.adaptive_structures --problem deep_narrow --steps 300
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lrkfac
from benchmarks.common import argument_parser, command_of, environment, results_table, wide_console, write_json, written
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.trainers import Functional, Setup
from lrkfac.core.curvature.factors import DenseState, DenseStructure
from lrkfac.linalg import Dense
from lrkfac.structures import dense, kronecker, low_rank, low_rank_plus_diagonal

MODULE = "benchmarks.adaptive_structures"
REFRESH, DECAY, DAMPING, GRADIENT_DECAY = 5, 0.8, 0.1, 0.6  # those of the adaptive chain and its benchmarks
TURNS = 10  # of eigenpairs and diagonal


@dataclass(frozen=True)
class BestOfRank(DenseStructure):
    """A dense average of which ``operator`` is the best of a rank: its dominant eigenpairs, exactly, and the rest."""

    rank: int = 16
    diagonal: bool = False

    @property
    def stackable(self) -> bool:
        return False

    def operator(self, state: DenseState) -> Dense:
        matrix, missed = state.matrix, state.matrix.shape[-1] - self.rank
        if missed <= 2:
            return Dense(matrix)
        rest = torch.zeros_like(matrix.diagonal(dim1=-2, dim2=-1))
        for _ in range(TURNS if self.diagonal else 1):
            values, vectors = torch.linalg.eigh(matrix - torch.diag_embed(rest))
            kept = _product(vectors[..., missed:], values[..., missed:].clamp(min=0))
            if self.diagonal:
                rest = (matrix - kept).diagonal(dim1=-2, dim2=-1).clamp(min=0)
        if self.diagonal:
            return Dense(kept + torch.diag_embed(rest))
        mean = values[..., :missed].clamp(min=0).mean(-1, keepdim=True)
        return Dense(kept + _product(vectors[..., :missed], mean.expand(*mean.shape[:-1], missed)))


def _product(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors * values[..., None, :]) @ vectors.mT


STRUCTURES: dict[str, Callable[[int], Any]] = {
    "low rank": lambda r: kronecker(low_rank(r, weight=2.0), low_rank_plus_diagonal(r, weight=0.5)),
    "weights 1": lambda r: kronecker(low_rank(r), low_rank_plus_diagonal(r)),
    "two iterations": lambda r: kronecker(
        low_rank(r, weight=2.0, iterations=2), low_rank_plus_diagonal(r, weight=0.5, iterations=2)
    ),
    "diagonals": lambda r: kronecker(low_rank_plus_diagonal(r), low_rank_plus_diagonal(r)),
    "exactly damped": lambda r: kronecker(low_rank(r), low_rank_plus_diagonal(r), exact_damping=True),
    "isotropic, exactly damped": lambda r: kronecker(low_rank(r), low_rank(r), exact_damping=True),
    "best of the rank": lambda r: kronecker(BestOfRank(r), BestOfRank(r, diagonal=True)),
    "A dense": lambda r: kronecker(dense(), low_rank_plus_diagonal(r, weight=0.5)),
    "B dense": lambda r: kronecker(low_rank(r, weight=2.0), dense()),
    "A of twice the rank": lambda r: kronecker(low_rank(2 * r), low_rank_plus_diagonal(r, weight=0.5)),
    "dense": lambda r: kronecker(dense(), dense()),
    "dense, exactly damped": lambda r: kronecker(dense(), dense(), exact_damping=True),
}
"""Of each name, ``rank -> structure``; ``low rank`` is the chain's own for wide layers."""


def losses(problem: Problem, structure: Any, seed: int, points: list[int]) -> Iterator[float]:
    """Trains, and yields the training loss at each point."""
    params = problem.init(seed)
    layers = lrkfac.find_layers(problem.model, params, problem.inputs[:2])
    preconditioner = lrkfac.precondition_by_fisher(layers, structure, decay=DECAY, balanced=True)
    transformation = lrkfac.scale_by_quadratic_model(preconditioner, DAMPING, gradient_decay=GRADIENT_DECAY)
    trainer = Functional(Setup(problem, params, layers, seed, max(points), 0, REFRESH, False), transformation)
    batches, full = problem.batches(problem.batch_size, seed), problem.batch_size >= len(problem.inputs)
    for step in range(1, max(points) + 1):
        batch = torch.arange(len(problem.inputs)) if full else next(batches)
        trainer.step(problem.inputs[batch], problem.targets[batch])
        if step in points:
            yield problem.loss(trainer.params())


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--problem", choices=list(PROBLEMS), default="deep_narrow", metavar="NAME", help="what is trained")
    add("--structure", choices=list(STRUCTURES), nargs="+", default=list(STRUCTURES), metavar="NAME", help="of factors")
    add("--rank", type=int, default=16, metavar="R", help="of low-rank factors")
    add("--steps", type=int, default=300, metavar="N", help="of training")
    add("--batch-size", type=int, metavar="N", help="examples per step; all of them, where there are no more")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S", help="of start, batches and noise")
    arguments = parser.parse_args()
    console = wide_console()
    described = environment(arguments.threads, torch.device("cpu")) | command_of(MODULE, vars(arguments))
    problem = PROBLEMS[arguments.problem](None, "relu")
    problem = dataclasses.replace(problem, batch_size=arguments.batch_size or problem.batch_size)
    points = sorted({max(1, arguments.steps // 3), max(1, 2 * arguments.steps // 3), arguments.steps})
    path = arguments.output / (
        f"adaptive_structures-{arguments.problem}-batch{problem.batch_size}-steps{arguments.steps}_cpu.json"
    )
    found: list[dict[str, Any]] = json.loads(path.read_text())["measured"] if path.exists() else []
    for seed in arguments.seeds:
        for name in arguments.structure:
            start = time.process_time()
            curve = [round(x, 4) for x in losses(problem, STRUCTURES[name](arguments.rank), seed, points)]
            key = {"structure": name, "rank": arguments.rank, "seed": seed}
            found = [row for row in found if any(row[k] != x for k, x in key.items())]
            found.append({**key, "steps": points, "loss": curve, "seconds": round(time.process_time() - start, 1)})
            console.print(f"{name}, rank {arguments.rank}, seed {seed}: {curve}", highlight=False)
            write_json(path, {"environment": described, "measured": found})
    headings = ["structure", "rank", "seed", *[f"{step} steps" for step in points], "processor's seconds"]
    rows = [[row["structure"], str(row["rank"]), str(row["seed"]), *[f"{x:.3f}" for x in row["loss"]],
             f"{row['seconds']:.0f}"] for row in found]  # fmt: skip
    console.print(results_table(f"{problem.title}: training loss, nats", headings, rows))
    written(path, console)


if __name__ == "__main__":
    main()
