"""Peak memory of a training step, by method, and the largest width whose steps complete within a limit.

A part of ``benchmarks.memory``, which runs each measurement in a process of its own:
``python -m benchmarks.memory_steps METHOD JSON`` prints the bytes of one.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
from rich.table import Table

import lrkfac
from benchmarks.common import held_bytes, printed_by_child, resident, results_table
from benchmarks.networks import Work, mean_loss, perceptron
from benchmarks.ratios import DAMPING, RATE, Functional
from lrkfac.transforms.precondition_state import PreconditionState

MODULE = "benchmarks.memory_steps"
SGD, IN_PLACE, ADAM, LOW_RANK, DENSE = "SGD, momentum", "torch.optim.SGD", "Adam", "low-rank K-FAC", "dense K-FAC"
LIMIT = 1.1
"""Of the peak of low-rank K-FAC over that of SGD with momentum, at width 8192."""
WIDTH_LIMIT = 16384
"""The width whose step must complete in 16 GiB."""
GIBI, MEBI = 2**30, 2**20
STEPS = 2
"""After the first, which refreshes: a plain step and another refresh."""


def functional_steps(functional: Functional, tx: lrkfac.GradientTransformation, curvature: bool) -> dict[str, int]:
    """Takes steps as in the README; bytes of the parameters and of the state."""
    params, state = functional.params, tx.init(functional.params)
    evaluate = functional.evaluator()
    functional.params = None
    for i in range(1 + STEPS):
        if curvature:
            evaluation = evaluate(params, *functional.batch, statistics=i % STEPS == 0)
            updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        else:
            grads, _ = functional.gradient(params)
            updates, state = tx.update(grads, state, params)
        params = lrkfac.apply_updates(params, updates)
    finite = all(bool(x.isfinite().all()) for x in optree.tree_leaves(params))
    return {"parameters": held_bytes(params), "state": held_bytes(state, beside=params), "finite": finite}


def steps_in_place(work: Work) -> dict[str, int]:
    """The same by torch's own optimizer, which changes parameters and momentum in place."""
    optimizer = torch.optim.SGD(work.module.parameters(), lr=RATE, momentum=0.9)
    for _ in range(1 + STEPS):
        optimizer.zero_grad()
        mean_loss(work.module(work.inputs), work.targets).backward()
        optimizer.step()
    params = list(work.module.parameters())
    state = [optimizer.state[p]["momentum_buffer"] for p in params]
    return {"parameters": held_bytes(params), "state": held_bytes(state), "finite": True}


def run(method: str, width: int, batch_size: int, rank: int, device: torch.device) -> dict[str, int]:
    """Builds the network and trains."""
    work = perceptron(width, batch_size, device)
    if method == IN_PLACE:
        return steps_in_place(work)
    functional = Functional(work)
    del work
    chains: dict[str, Callable[[], lrkfac.GradientTransformation]] = {
        SGD: lambda: lrkfac.chain(lrkfac.trace(0.9), lrkfac.scale_by_learning_rate(RATE)),
        ADAM: lambda: lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.scale_by_learning_rate(1e-4)),
        LOW_RANK: lambda: lrkfac.low_rank_kfac(functional.layers, RATE, rank, DAMPING),
        DENSE: lambda: lrkfac.kfac(functional.layers, RATE, DAMPING),
    }
    return functional_steps(functional, chains[method](), method in (LOW_RANK, DENSE))


def child(method: str, width: int, batch_size: int, rank: int, device: str, threads: int, limit: int) -> dict[str, int]:
    """Bytes at the peak of everything from the network on, and of the whole process."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    run(method, 64, batch_size, rank, where)  # loads what is loaded at the first call
    if where.type == "cuda":
        if limit:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(where)[1]), where)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where)
        found = run(method, width, batch_size, rank, where)
        peak = torch.cuda.max_memory_allocated(where)
        return {**found, "peak": peak, "process": torch.cuda.max_memory_reserved(where)}
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    found = run(method, width, batch_size, rank, where)
    return {**found, "peak": resident("VmHWM") - before, "process": resident("VmHWM")}


def in_child(method: str, width: int, limit: int = 0, **options: Any) -> dict[str, Any] | None:
    """The same in a process of its own; ``None`` where that fails for want of memory."""
    try:
        printed = printed_by_child(MODULE, method, json.dumps({"width": width, "limit": limit, **options}))
    except subprocess.CalledProcessError as error:
        if limit and ("alloc" in error.stderr or "memory" in error.stderr or error.returncode == -9):
            return None
        raise RuntimeError(f"{method} at width {width}: {error.stderr[-2000:]}") from error
    return {"method": method, "width": width, **json.loads(printed.splitlines()[-1])}


def peaks(widths: Sequence[int], dense_up_to: int, **options: Any) -> list[dict[str, Any]]:
    """Of each method at each width, with the least that it could be: parameters and state, old and new."""
    found = []
    for width in widths:
        of_width = [SGD, IN_PLACE, ADAM, LOW_RANK, *([DENSE] if width <= dense_up_to else [])]
        rows = [in_child(method, width, **options) for method in of_width]
        for row in rows:
            assert row is not None
            # In place, a gradient takes the place of what is new.
            new = row["parameters"] + (row["state"] if row["method"] != IN_PLACE else 0)
            row |= {"floor": row["parameters"] + row["state"] + new, "ratio": row["peak"] / max(1, rows[0]["peak"])}
            found.append(row)
    return found


def largest(widths: Sequence[int], limit: int, methods: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """For each method whether its steps complete within the limit, until the first width where they do not."""
    found = []
    for method in methods:
        for width in widths:
            row = in_child(method, width, limit, **options)
            completes = row is not None and row["process"] <= limit
            found.append({"method": method, "width": width, "completes": completes, "process": row and row["process"]})
            if not completes:
                break
    return found


def state_numbers(width: int, rank: int, batch_size: int = 8) -> dict[str, float]:
    """Numbers of state of the three wide layers, beyond parameters and momentum, beside the promise."""
    functional = Functional(perceptron(width, batch_size, torch.device("cpu")))
    layers = [layer for layer in functional.layers if layer.d_out == width]
    tx = lrkfac.low_rank_kfac(functional.layers, RATE, rank, DAMPING)
    evaluation = functional.evaluator()(functional.params, *functional.batch)
    state = tx.update(evaluation.grads, tx.init(functional.params), functional.params, evaluation=evaluation)[1]
    (own,) = (part for part in state if isinstance(part, PreconditionState))
    # Copies, since layers of equal form may share one piece of memory with others.
    kept = {layer.name: (own.factors[layer.name], own.inverses[layer.name]) for layer in layers}
    numbers = sum(unique_numbers(kept[layer.name]) for layer in layers)
    return {"width": width, "rank": rank, "numbers": numbers / len(layers),
            "promise": sum((2 * rank + 4) * (layer.d_in + layer.d_out) for layer in layers) / len(layers)}  # fmt: skip


def unique_numbers(tree: Any) -> int:
    """Of the tensors of a tree: what is the same memory, or repeated along an axis, counts once."""
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for x in optree.tree_leaves(tree):
        own = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
        seen[x.data_ptr(), tuple(own.shape)] = own.numel()
    return sum(seen.values())


def steps_table(rows: Sequence[dict[str, Any]], batch_size: int, rank: int) -> Table:
    """Peaks, with floors."""
    title = f"Peak memory of steps, three layers, batch {batch_size}, rank {rank}, float32"
    headings = ["method", "width", "state [MiB]", "state /parameters", "peak [MiB]", "floor [MiB]", "/SGD,_momentum"]
    return results_table(title, headings, [
        [row["method"], str(row["width"]), f"{row['state'] / MEBI:.0f}", f"{row['state'] / row['parameters']:.2f}",
         f"{row['peak'] / MEBI:.0f}", f"{row['floor'] / MEBI:.0f}", f"{row['ratio']:.2f}"]
        for row in rows
    ])  # fmt: skip


def largest_table(rows: Sequence[dict[str, Any]], limit: int) -> Table:
    """Which widths complete."""
    title = f"Widths of three layers whose steps complete in {limit / GIBI:g} GiB, refreshes included"
    return results_table(title, ["method", "width", "completes", "process [GiB]"], [
        [row["method"], str(row["width"]), "yes" if row["completes"] else "no",
         "" if row["process"] is None else f"{row['process'] / GIBI:.1f}"]
        for row in rows
    ])  # fmt: skip


def main() -> None:
    """Prints the measurement of one method as JSON."""
    print(json.dumps(child(sys.argv[1], **json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
