"""Training by every method of one framework, in a process of its own: a part of ``benchmarks.kfac_jax``.

``python -m benchmarks.kfac_jax_rounds JSON`` trains for one period with each line that it reads, and prints seconds.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lrkfac
from benchmarks.networks import perceptron
from benchmarks.problems import PROBLEMS

MODULE = "benchmarks.kfac_jax_rounds"
DIGITS, DIGITS_BATCH = "digits", 256
"""The eight layers of the digits autoencoder, beside perceptrons that are named by their width."""
JAX, EAGER, COMPILED = "JAX", "torch", "torch, compiled"
SGD = "SGD"
RATE, DAMPING, MOMENTUM = 1e-3, 1e-2, 0.9

Batch = tuple[Tensor, Tensor]


class Network(NamedTuple):
    """A model of linear layers, and what it is trained with; ``module`` is the same for other libraries, if any."""

    model: Callable[[Any, Tensor], Tensor]
    params: Any
    likelihood: lrkfac.Likelihood
    batches: Iterator[Batch]
    activation: str
    module: Any = None


def network(size: str, batch_size: int, device: torch.device) -> Network:
    """Both frameworks start from the same parameters, and see the same batches."""
    if size == DIGITS:
        problem = PROBLEMS["digits_autoencoder"](None, "")
        numbers = problem.batches(DIGITS_BATCH, seed=0)
        batches = ((problem.inputs[i].to(device), problem.targets[i].to(device)) for i in numbers)
        params = [{name: x.to(device) for name, x in layer.items()} for layer in problem.init(0)]
        return Network(problem.model, params, problem.likelihood, batches, "tanh")
    work = perceptron(int(size), batch_size, device)
    model, params = lrkfac.from_module(work.module)
    return Network(model, params, lrkfac.categorical(), _random(work.inputs, work.targets), "relu", work)


def _random(inputs: Tensor, targets: Tensor) -> Iterator[Batch]:
    """Labels that nothing can learn: gradients stay as large as at the start, and rates fit to all steps."""
    generator = torch.Generator(inputs.device).manual_seed(1)
    while True:
        some = torch.randn(inputs.shape, generator=generator, device=inputs.device)
        yield some, targets[torch.randperm(len(targets), generator=generator, device=inputs.device)]


class Training:
    """Parameters and state on their way; ``step(params, state, number, batch)`` returns both."""

    def __init__(self, step: Callable[[Any, Any, int, Any], tuple[Any, Any]], params: Any, state: Any = ()) -> None:
        self._step, self.params, self._state = step, params, state

    def __call__(self, number: int, batch: Any) -> Any:
        """Takes a step, and returns what is to be waited for."""
        self.params, self._state = self._step(self.params, self._state, number, batch)
        return self.params


class Framework(NamedTuple):
    """By name what begins a training; how to wait for results, to take a batch over, and to see a sum of numbers."""

    makers: dict[str, Callable[[], Training]]
    missing: dict[str, str]
    wait: Callable[[Any], Any]
    batch: Callable[[Batch], Any]
    total: Callable[[Any], float]


class Rounds:
    """All trainings of one framework, step by step in turn, so that what disturbs the machine disturbs all alike."""

    def __init__(self, framework: Framework, batches: Iterator[Batch], every: int) -> None:
        self._framework, self._batches, self._every = framework, batches, every
        self.trainings: dict[str, Training] = {}
        self._number = 0

    def round(self) -> dict[str, Any]:
        """Seconds of each step until the next refresh, by the clock and of processors; the first round compiles."""
        names, wait = list(self._framework.makers), self._framework.wait
        seconds: dict[str, list[float]] = {name: [] for name in names}
        processors: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self._every):
            batch = wait(self._framework.batch(next(self._batches)))
            for name in names:
                start, before = time.perf_counter(), _processor_seconds()
                if name not in self.trainings:
                    self.trainings[name] = self._framework.makers[name]()
                wait(self.trainings[name](self._number, batch))
                seconds[name].append(time.perf_counter() - start)
                processors[name].append(_processor_seconds() - before)
            names = names[1:] + names[:1]
            self._number += 1
        total = self._framework.total
        finite = {name: math.isfinite(total(training.params)) for name, training in self.trainings.items()}
        return {"seconds": seconds, "processors": processors, "finite": finite, "missing": self._framework.missing}


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for, such as compilers."""
    return time.process_time() + sum(os.times()[2:4])


def main() -> None:
    """The child's work."""
    settings = json.loads(sys.argv[1])
    replies = sys.stdout
    torch.set_num_threads(settings["threads"])
    with redirect_stdout(sys.stderr):  # libraries may print
        some = network(settings["size"], settings["batch_size"], torch.device(settings["device"]))
        module = "kfac_jax_in_jax" if settings["framework"] == JAX else "kfac_jax_in_torch"
        framework = import_module(f"benchmarks.{module}").framework(some, settings)
        rounds = Rounds(framework, some.batches, settings["every"])
        for _ in sys.stdin:
            print(json.dumps(rounds.round()), file=replies, flush=True)


if __name__ == "__main__":
    main()
