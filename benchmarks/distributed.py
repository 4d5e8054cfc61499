"""Bytes that processes exchange in a refresh, counted in 2 and 4 of them, and a model of the time on 1024 GPUs.

python -m benchmarks.distributed
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from torch import nn

import lrkfac
from benchmarks.common import (
    COLOURS,
    argument_parser,
    command_of,
    environment,
    results_table,
    wide_console,
    write_results,
)
from benchmarks.distributed_model import NETWORKS, WAYS, Machine, Network, perceptron
from lrkfac.core.base.processes import counted

MODULE = "benchmarks.distributed"
GRADIENT, LOW_RANK, DENSE = "gradient", "low rank", "dense"
SIZES = (1, 8, 64, 256, 1024)
"""Numbers of GPUs of the model."""


def calls_of_a_refresh(width: int, depth: int, rank: int, batch_size: int = 8) -> dict[str, list[int]]:
    """Bytes of each call of this process: those of an evaluation and of the update after it, low rank and dense."""
    torch.manual_seed(0)
    net = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())][:-1])
    model, params = lrkfac.from_module(net)
    inputs, targets = torch.randn(batch_size, width), torch.randint(width, (batch_size,))
    layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, group=dist.group.WORLD)
    with counted() as of_evaluation:
        evaluation = evaluate(params, inputs, targets)
    found = {GRADIENT: of_evaluation}
    for name, tx in {LOW_RANK: lrkfac.low_rank_kfac(layers, 0.1, rank=rank), DENSE: lrkfac.kfac(layers, 0.1)}.items():
        with counted() as found[name]:
            tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
    return {name: [size for _, size in calls] for name, calls in found.items()}


def _process(rank: int, processes: int, folder: Path, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )  # fmt: skip
    result = work()
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def in_processes(processes: int, work: Callable[[], Any]) -> Any:
    """What ``work()`` returns in the first of ``processes`` on gloo, without a port."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (processes, Path(folder), work), nprocs=processes)
        return json.loads(Path(folder, "result.json").read_text())


def counts(processes: int, widths: Sequence[int], depth: int, rank: int) -> list[dict[str, Any]]:
    """For each width bytes and calls, and the bytes that the formula says."""
    works = [partial(calls_of_a_refresh, width, depth, rank) for width in widths]
    found = in_processes(processes, partial(_all, works))
    return [
        {
            "processes": processes,
            "width": width,
            "bytes": {name: sum(calls) for name, calls in of_width.items()},
            "calls": {name: len(calls) for name, calls in of_width.items()},
            "formula": {LOW_RANK: network.low_rank(rank), DENSE: network.dense()},
        }
        for width, of_width in zip(widths, found, strict=True)
        for network in [perceptron(width, depth)]
    ]


def _all(works: Sequence[Callable[[], Any]]) -> list[Any]:
    return [work() for work in works]


def modelled(network: Network, rank: int, every: int, machine: Machine) -> dict[str, Any]:
    """Bytes, and by the number of GPUs the seconds of the gradient, of a refresh, and of what a step sends."""
    rows = []
    for size in SIZES[1:]:
        gradient = machine.seconds(network.gradient(), 1, size)
        refresh = {way.name: machine.seconds(way.bytes(network, rank), way.calls(network), size) for way in WAYS}
        ours = refresh[WAYS[0].name]
        steps = {"each step": gradient + ours, f"every {every}": gradient + ours / every}
        rows.append({"GPUs": size, GRADIENT: gradient, "refresh": refresh, "steps": steps})
    sent = {GRADIENT: network.gradient(), LOW_RANK: network.low_rank(rank), DENSE: network.dense()}
    return {"network": network.name, "layers": len(network.layers), "bytes": sent, "rows": rows}


def counted_table(found: Sequence[dict[str, Any]], rank: int, depth: int) -> Any:
    """One row for each width and number of processes."""
    headings = ["processes", "width", "gradient [B]", "low_rank [B]", "/formula", "calls", "dense [B]", "calls"]
    return results_table(
        f"Counted: what a process hands to all-reduce, {depth} layers, rank {rank}, float32",
        [*headings, "dense /low_rank", "low_rank /gradient"],
        [
            [
                str(one["processes"]), str(one["width"]), f"{sent[GRADIENT]:,}", f"{sent[LOW_RANK]:,}",
                f"{sent[LOW_RANK] / one['formula'][LOW_RANK]:.3f}", str(one["calls"][LOW_RANK]), f"{sent[DENSE]:,}",
                str(one["calls"][DENSE]), f"{sent[DENSE] / sent[LOW_RANK]:.1f}",
                f"{sent[LOW_RANK] / sent[GRADIENT]:.2f}",
            ]
            for one in found
            for sent in [one["bytes"]]
        ],
    )  # fmt: skip


def milliseconds(seconds: float) -> str:
    """With three digits or those before the point."""
    return f"{1e3 * seconds:.3f}"[:5].rstrip(".") if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def model_table(found: Sequence[dict[str, Any]], size: int, rank: int) -> Any:
    """One row for each network at one number of GPUs."""
    steps = list(found[0]["rows"][-1]["steps"])
    headings = ["network", *(f"{name} [MB]" for name in (GRADIENT, LOW_RANK, DENSE)), "gradient [ms]"]
    headings += [f"{way.name} [ms]" for way in WAYS]
    rows = []
    for one in found:
        (row,) = [row for row in one["rows"] if row["GPUs"] == size]
        times = [row[GRADIENT], *row["refresh"].values(), *row["steps"].values()]
        sent = [f"{one['bytes'][name] / 1e6:,.1f}" for name in (GRADIENT, LOW_RANK, DENSE)]
        rows.append([one["network"], *sent, *(milliseconds(seconds) for seconds in times)])
    title = f"Model: time of collectives on {size} GPUs, rank {rank}, float32, nothing overlaps"
    return results_table(title, [*headings, *(f"gradient and refresh {name} [ms]" for name in steps)], rows)


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each network: gradient and refreshes against the number of GPUs."""
    figure = Figure(figsize=(3 * len(found), 3.4), dpi=150, layout="constrained")
    for axis, one in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        sizes = [row["GPUs"] for row in one["rows"]]
        axis.plot(sizes, [1e3 * row[GRADIENT] for row in one["rows"]], marker="o", color=COLOURS[0], label=GRADIENT)
        for colour, name in zip(COLOURS[1:], one["rows"][0]["refresh"], strict=False):
            seconds = [1e3 * row["refresh"][name] for row in one["rows"]]
            axis.plot(sizes, seconds, marker="o", color=colour, label=f"refresh: {name}")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=one["network"])
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("modelled time [ms]")
    figure.axes[0].legend(fontsize=6)
    return figure


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[2, 4], metavar="W", help="processes in which bytes are counted")
    add("--widths", type=int, nargs="+", default=[256, 1024], metavar="D", help="of the layers in which they are")
    add("--depth", type=int, default=3, metavar="L", help="number of these layers")
    add("--rank", type=int, default=32, metavar="R", help="of the factors")
    add("--every", type=int, default=10, metavar="K", help="steps per refresh")
    arguments = parser.parse_args()
    described = environment(arguments.threads, torch.device("cpu")) | command_of(MODULE, vars(arguments))
    console, machine = wide_console(), Machine()
    found: list[dict[str, Any]] = []
    for processes in arguments.processes:
        with console.status(f"counting in {processes} processes"):
            found += counts(processes, arguments.widths, arguments.depth, arguments.rank)
    console.print(counted_table(found, arguments.rank, arguments.depth))
    model = [modelled(network, arguments.rank, arguments.every, machine) for network in NETWORKS]
    for size in (machine.node, SIZES[-1]):
        console.print(model_table(model, size, arguments.rank))
    console.print(
        f"Assumed, not measured: all-reduce of S bytes on W GPUs takes 2 S (W-1)/W / bandwidth + 2 log2(W) x "
        f"{1e6 * machine.latency:g} us; {machine.near / 1e9:g} GB/s up to {machine.node} GPUs, {machine.far / 1e9:g} "
        "GB/s beyond; all in float32; chunks of one call follow one another without waiting; no time for arithmetic.",
        highlight=False,
    )
    console.print(described)
    content = {"environment": described, "assumed": machine._asdict(), "counted": found, "model": model}
    write_results(arguments.output / "distributed_cpu.json", content, draw(model), console)


if __name__ == "__main__":
    main()
