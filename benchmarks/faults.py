"""Training while batches go wrong at random: whether it stays finite, still learns, and holds no more memory.

python -m benchmarks.faults
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import lrkfac
from benchmarks.common import RESULTS, environment, results_table, write_json, written

CHAINS: dict[str, Callable[[Any], lrkfac.GradientTransformation]] = {
    "low_rank_kfac within apply_if_finite": lambda layers: lrkfac.apply_if_finite(
        lrkfac.low_rank_kfac(layers, 0.3, rank=3, decay=0.8, kl_clip=1e-2), 10
    ),
    "adaptive_low_rank_kfac": lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=3, kl_clip=1.0),
    "spectral_kfac without a rate": lambda layers: lrkfac.spectral_kfac(layers, rank=3),
}
CLASS = "LowRankKFAC"
FAULTS = {
    "nan inputs": 0.02,
    "infinite targets": 0.02,
    "empty batch": 0.02,
    "zero gradients": 0.02,
    "dead layer": 0.02,
    "inputs times 1e6": 0.002,
    "inputs times 1e-6": 0.002,
    "targets times 1e6": 0.002,
    "targets times 1e-6": 0.002,
}
"""Share of the steps at which each happens."""
MEMORY = (("tensors", 1, 0), ("blocks", 1, 0), ("resident", 1e6, 1))
SETTLED = 100
"""Step from which on memory must not grow."""


class Network(nn.Module):
    """4-8-8-2, whose first hidden layer a gate of the inputs may silence.

    Its units never die for good: after a batch of targets times 1e6, which the untuned chain fits at once, ReLU would
    leave nothing to learn with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        hidden = gate * F.leaky_relu(self.first(x), 0.1)
        return self.last(F.leaky_relu(self.second(hidden), 0.1))


def data(seed: int, n: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a smooth function."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, torch.tanh(x @ torch.randn(4, 2, generator=generator))


def spoiled(fault: str | None, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch after a fault."""
    if fault == "nan inputs":
        x = x.clone()
        x[0, 0] = torch.nan
    elif fault == "infinite targets":
        y = y.clone()
        y[0, 0] = torch.inf
    elif fault == "empty batch":
        x, y, gate = x[:0], y[:0], gate[:0]
    elif fault == "dead layer":
        gate = torch.zeros_like(gate)
    elif fault is not None and " times " in fault:
        what, factor = fault.split(" times ")
        x, y = (x * float(factor), y) if what == "inputs" else (x, y * float(factor))
    return x, y, gate


def memory() -> dict[str, int]:
    """The tensors alive, the blocks of memory that Python holds, and the bytes of the process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has objects that warn when their class is asked for
        tensors = sum(isinstance(x, Tensor) for x in gc.get_objects())
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0
    return {"tensors": tensors, "blocks": sys.getallocatedblocks(), "resident": resident}


def trained(name: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """Runs one chain, and says what it came to."""
    torch.manual_seed(seed)
    net, (x, y) = Network(), data(seed)
    inputs, likelihood = (x, torch.ones(len(x), 1)), lrkfac.gaussian()
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, likelihood, layers)
    optimizer = lrkfac.LowRankKFAC(net, likelihood, inputs, transformation=CHAINS[next(iter(CHAINS))])
    tx = CHAINS.get(name, CHAINS["adaptive_low_rank_kfac"])(layers)
    state, start = tx.init(params), float(likelihood.loss(model(params, inputs), y))
    generator = torch.Generator().manual_seed(seed)
    names, shares = [None, *FAULTS], torch.tensor([1 - sum(FAULTS.values()), *FAULTS.values()])
    drawn = torch.multinomial(shares, steps, replacement=True, generator=generator).tolist()
    batches = torch.randint(len(x), (steps, 32), generator=generator)
    happened: Counter[str] = Counter()
    begin, first = time.perf_counter(), memory()
    for step in range(steps):
        fault, batch = names[drawn[step]], batches[step]
        some, targets, gate = spoiled(fault, x[batch], y[batch], inputs[1][batch])
        happened[fault or "none"] += 1
        try:
            if name == CLASS:
                optimizer.evaluate((some, gate), targets, statistics=step % 2 == 0)
                if fault == "zero gradients":
                    optimizer.zero_grad(set_to_none=False)
                optimizer.step()
            else:
                e = evaluate(params, (some, gate), targets, statistics=step % 2 == 0)
                if fault == "zero gradients":
                    e = e._replace(grads=optree.tree_map(torch.zeros_like, e.grads))
                updates, state = tx.update(e.grads, state, params, evaluation=e)
                params = lrkfac.apply_updates(params, updates)
        except ValueError as error:
            if fault != "empty batch" or "the batch is empty" not in str(error):
                raise
        e = updates = None
        if step + 1 == min(SETTLED, steps):
            first = memory()
    last, seconds = memory(), time.perf_counter() - begin
    if name == CLASS:
        params, state = optimizer.params, optimizer.chain_state
    end = float(likelihood.loss(model(params, inputs), y))
    finite = all(bool(leaf.isfinite().all()) for leaf in optree.tree_leaves((params, state)))
    return {"method": name, "steps": steps, "seed": seed, "seconds": seconds, "finite": finite, "loss": [start, end],
            "faults": dict(happened), "memory": [first, last]}  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="of each method (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console()
    runs = [trained(name, arguments.steps) for name in (*CHAINS, CLASS)]
    rows = [
        (
            run["method"],
            str(sum(n for fault, n in run["faults"].items() if fault != "none")),
            "yes" if run["finite"] else "no",
            "{:.4f} -> {:.4f}".format(*run["loss"]),
            *(" -> ".join(f"{at[what] / unit:.{digits}f}" for at in run["memory"]) for what, unit, digits in MEMORY),
            f"{run['seconds']:.0f}",
        )
        for run in runs
    ]
    titles = ("method", "faults", "finite", "loss", f"tensors, step {SETTLED} -> last", "blocks", "MB", "seconds")
    console.print(results_table(f"{arguments.steps} steps with faults", titles, rows), width=150)
    path = arguments.output / "faults_cpu.json"
    where = environment(1, torch.device("cpu"))
    write_json(path, {"command": "python -m benchmarks.faults", "environment": where, "runs": runs})
    written(path, console)


if __name__ == "__main__":
    main()
