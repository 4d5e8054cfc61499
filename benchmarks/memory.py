"""Peak memory of a ResNet-18's statistics beside that of its plain gradient, and bytes of optimizer state.

python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.func import grad

import lrkfac
from benchmarks.alive import alive_at_peak
from benchmarks.common import (
    COLOURS,
    RESULTS,
    environment,
    peak_bytes,
    peak_resident_bytes,
    printed_by_child,
    results_table,
    save_figure,
    tree_bytes,
    write_json,
    written,
)
from benchmarks.resnet18 import ResNet18

MODULE = "benchmarks.memory"
PLAIN = "gradient"
LIMIT = 1.3
"""What the statistics may take, in units of the plain gradient's peak, at batch 128."""
RANK = 32
MEBI = 2**20


def works(batch_size: int, device: torch.device) -> tuple[dict[str, Callable[[], Any]], Any]:
    """What is measured, and the tensors that it holds all the time.

    The plain functional gradient; loss, gradient and statistics under each estimator; and autograd without
    ``torch.func``, which keeps nothing for second derivatives.
    """
    torch.manual_seed(0)
    model, params, buffers = lrkfac.from_module(ResNet18().to(device), buffers=True)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    layers = lrkfac.find_layers(model, params, (buffers, images))

    def loss(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, after = model(params, (buffers, images))
        return F.cross_entropy(outputs, labels), after

    functions = {PLAIN: lambda: grad(loss, has_aux=True)(params)}
    for estimator in ("empirical", "mc"):
        evaluate = lrkfac.fisher(model, lrkfac.categorical(), layers, estimator=estimator, has_aux=True)
        functions[estimator] = lambda evaluate=evaluate: evaluate(params, (buffers, images), labels)

    def backward() -> tuple[Tensor, ...]:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        with torch.enable_grad():
            return torch.autograd.grad(loss(leaves)[0], list(leaves.values()))

    functions["backward"] = backward
    return functions, (params, buffers, images, labels)


def measured(batch_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Bytes at the peak of each work, including parameters, buffers and batch, and its ratio to the gradient's."""
    functions, held = works(batch_size, device)
    found: list[dict[str, Any]] = []
    for name, function in functions.items():
        function()
        alive = alive_at_peak(function, held)
        peaks = {"allocated": peak_bytes(function, device), "alive": alive.peak}
        if device.type == "cpu":
            printed = printed_by_child(MODULE, "--batch-sizes", str(batch_size), "--resident", name)
            peaks["resident"] = int(printed.split()[-1])
        largest: Counter[str] = Counter()
        for storage in alive.at_peak:
            largest[f"{storage.operation.removeprefix('aten.').removesuffix('.default')} in {storage.place}"] += (
                storage.nbytes
            )
        row: dict[str, Any] = {"work": name, "batch size": batch_size}
        for kind, peak in peaks.items():
            row[kind] = peak + tree_bytes(held)
            row[f"{kind} ratio"] = row[kind] / (found[0][kind] if found else row[kind])
        found.append({**row, "at peak": dict(largest.most_common(8))})
    return found


def states() -> list[dict[str, Any]]:
    """Bytes of each optimizer's state for this network."""
    model, params, buffers = lrkfac.from_module(ResNet18(), buffers=True)
    layers = lrkfac.find_layers(model, params, (buffers, torch.zeros(2, 3, 32, 32)))
    transformations = {
        "SGD, momentum": lrkfac.trace(0.9),
        "Adam": lrkfac.scale_by_adam(),
        "dense K-FAC": lrkfac.kfac(layers, 0.1),
        f"low-rank K-FAC, rank {RANK}": lrkfac.low_rank_kfac(layers, 0.1, rank=RANK),
    }
    own = tree_bytes(params)
    found = []
    for name, transformation in transformations.items():
        size = tree_bytes(transformation.init(params))
        found.append({"optimizer": name, "bytes": size, "parameters ratio": size / own})
    return found


def draw(rows: list[dict[str, Any]], of_states: list[dict[str, Any]]) -> Figure:
    """Ratios of peaks on the left, bytes of state on the right."""
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{row['work']}, batch {row['batch size']}" for row in rows]
    bars = left.barh(names, [row["allocated ratio"] for row in rows], color=COLOURS[2])
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.axvline(LIMIT, color=COLOURS[5], linestyle="--")
    left.set_xlabel(f"peak memory / that of the plain gradient\n(dashed: {LIMIT}, the limit at batch 128)")
    left.set_title("Statistics of a ResNet-18", fontsize=11)
    sizes = [row["bytes"] / MEBI for row in of_states]
    bars = right.barh([row["optimizer"] for row in of_states], sizes, color=COLOURS[3])
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.set_xlabel("state [MiB]")
    right.set_title("Optimizer state of a ResNet-18", fontsize=11)
    for axis in (left, right):
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Runs the benchmark."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    described = environment(arguments.threads, device)
    if arguments.resident:
        small, large = works(2, device)[0], works(arguments.batch_sizes[0], device)[0]
        small[arguments.resident]()  # loads what is loaded at the first call
        print(peak_resident_bytes(large[arguments.resident]))
        return
    console = Console()
    with console.status("measuring"):
        rows = [row for batch_size in arguments.batch_sizes for row in measured(batch_size, device)]
        of_states = states()

    kinds = [kind for kind in ("allocated", "alive", "resident") if kind in rows[0]]
    headings = ["work", "batch", *(text for kind in kinds for text in (f"{kind} [MiB]", "ratio"))]
    console.print(results_table("Peak memory of a ResNet-18, 32 x 32 images, float32", headings, [
        [row["work"], str(row["batch size"]),
         *(text for kind in kinds for text in (f"{row[kind] / MEBI:.0f}", f"{row[f'{kind} ratio']:.3f}"))]
        for row in rows
    ]))  # fmt: skip
    console.print(
        "allocated: by the profiler (CUDA: by the allocator); alive: storages that outlive an operation; resident: of "
        "a process of its own. All with parameters and batch."
    )
    console.print(results_table("State of the optimizer", ["optimizer", "MiB", "of the parameters' size"], [
        [row["optimizer"], f"{row['bytes'] / MEBI:.1f}", f"{row['parameters ratio']:.2f}"] for row in of_states
    ]))  # fmt: skip
    for row in rows if arguments.explain else ():
        title = f"Alive at the peak: {row['work']}, batch {row['batch size']}"
        shares = [[name, f"{size / MEBI:.1f}"] for name, size in row["at peak"].items()]
        console.print(results_table(title, ["operation", "MiB"], shares))
    path = RESULTS / f"memory_{device.type}.json"
    write_json(path, {"environment": described, "peaks": rows, "states": of_states})
    written(path, console)
    save_figure(path.with_suffix(".png"), draw(rows, of_states), console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[32, 128], metavar="N", help="images per batch")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads")
    add("--explain", action="store_true", help="also show which operations' results are alive at the peak")
    add("--resident", metavar="WORK", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
