"""Training runs: their curves, kept in one JSON file a table, so that runs can be resumed and added."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import synchronize, write_json
from benchmarks.problem import Problem
from benchmarks.trainers import Trainer


class Key(NamedTuple):
    """What tells one run of a file from another; ``settings`` is JSON with sorted keys."""

    method: str
    settings: str
    seed: int


@dataclass
class Run:
    """One training run.

    Attributes:
        method: A key of ``METHODS``.
        settings: From its grid, and the rank and the steps between statistics where it takes them.
        seed: Of start, batches and noise.
        environment: Index of the file's environment that it ran in: one per command.
        state_bytes: Bytes of the optimizer's state.
        steps: Of each point of the curve.
        seconds: Since the start, in training steps alone: neither evaluation nor the choice of batches counts.
        loss: Training loss, in nats; the curve ends where it is not finite.
        diverged: Whether it ended so.
        accuracy: On test examples, where the problem has them.
    """

    method: str
    settings: dict[str, Any]
    seed: int
    environment: int = -1
    state_bytes: int = 0
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    diverged: bool = False
    accuracy: list[float] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return Key(self.method, json.dumps(self.settings, sort_keys=True), self.seed)

    @property
    def final_loss(self) -> float:
        """The last loss, infinite where training diverged."""
        return math.inf if self.diverged else self.loss[-1]


def train(
    problem: Problem, trainer: Trainer, run: Run, batch_size: int, steps: int, points: int, device: torch.device
) -> Iterator[int]:
    """Trains, fills in the run, and pauses at every point of the curve: it yields the steps done since the last.

    Runs that are advanced in turn share what disturbs the machine.
    """
    trainer.warm_up(*(x[: min(batch_size, len(x))] for x in (problem.inputs, problem.targets)))
    at = {round(i * steps / points) for i in range(points + 1)}
    batches, seconds, last = problem.batches(batch_size, run.seed), 0.0, 0
    for step in range(steps + 1):
        if step in at:
            judged = trainer.params(), trainer.buffers()
            loss = problem.loss(*judged)
            run.state_bytes = trainer.state_bytes()
            if not math.isfinite(loss):
                run.diverged = True
                yield steps - last
                return
            run.steps.append(step)
            run.seconds.append(round(seconds, 5))
            run.loss.append(float(f"{loss:.6g}"))
            if (accuracy := problem.accuracy(*judged)) is not None:
                run.accuracy.append(round(accuracy, 5))
            yield step - last
            last = step
        if step == steps:
            return
        batch = next(batches).to(device)
        inputs, targets = problem.inputs[batch], problem.targets[batch]
        synchronize(device)
        start = time.perf_counter()
        trainer.step(inputs, targets)
        synchronize(device)
        seconds += time.perf_counter() - start


class Results:
    """The runs of one problem under one set of options, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environments: list[dict[str, Any]] = []
        self.runs: dict[Key, Run] = {}
        if path.exists():
            content = json.loads(path.read_text())
            self.environments = content["environments"]
            self.runs = {run.key: run for run in (Run(**values) for values in content["runs"])}

    def add(self, runs: Iterable[Run], environment: dict[str, Any]) -> None:
        """Adds runs that were made in an environment, in place of those of the same method, settings and seed."""
        if environment not in self.environments:
            self.environments.append(environment)
        for run in runs:
            run.environment = self.environments.index(environment)
            self.runs[run.key] = run

    def write(self) -> None:
        """Writes the file. Environments that no run is of any more are left out."""
        used = sorted({run.environment for run in self.runs.values()})
        for run in self.runs.values():
            run.environment = used.index(run.environment)
        self.environments = [self.environments[i] for i in used]
        ordered = sorted(self.runs.values(), key=lambda run: run.key)
        values = [{name: x for name, x in vars(run).items() if name != "accuracy" or x} for run in ordered]
        write_json(self.path, {"environments": self.environments, "runs": values})

    def best(self, method: str, rank: int | None = None) -> list[Run]:
        """The runs of all seeds under the method's best settings: the least median of the final loss.

        Of settings that ran from fewer seeds than others, none is chosen.
        """
        by_settings: dict[str, list[Run]] = {}
        for run in self.runs.values():
            if run.method == method and (rank is None or run.settings.get("rank") == rank):
                by_settings.setdefault(run.key.settings, []).append(run)
        if not by_settings:
            return []
        most = max(map(len, by_settings.values()))
        candidates = [runs for runs in by_settings.values() if len(runs) == most]
        return min(candidates, key=lambda runs: statistics.median(run.final_loss for run in runs))
