"""Peak memory of a ResNet-18's statistics beside that of its plain gradient, and bytes of optimizer state.

A part of ``benchmarks.memory``, which calls it in a process of its own for the resident memory of one work.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.func import grad

import lrkfac
from benchmarks.alive import alive_at_peak
from benchmarks.common import (
    peak_bytes,
    peak_resident_bytes,
    printed_by_child,
    results_table,
    tree_bytes,
)
from benchmarks.resnet18 import ResNet18

MODULE = "benchmarks.memory_statistics"
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
        evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator=estimator, has_aux=True)
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
            printed = printed_by_child(MODULE, name, str(batch_size), str(torch.get_num_threads()))
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


def peaks_table(rows: list[dict[str, Any]]) -> Table:
    """Bytes at the peak, by each way to measure them."""
    kinds = [kind for kind in ("allocated", "alive", "resident") if kind in rows[0]]
    headings = ["work", "batch", *(text for kind in kinds for text in (f"{kind} [MiB]", "ratio"))]
    return results_table("Peak memory of a ResNet-18, 32 x 32 images, float32", headings, [
        [row["work"], str(row["batch size"]),
         *(text for kind in kinds for text in (f"{row[kind] / MEBI:.0f}", f"{row[f'{kind} ratio']:.3f}"))]
        for row in rows
    ])  # fmt: skip


def states_table(rows: list[dict[str, Any]]) -> Table:
    """Bytes of state of each optimizer."""
    return results_table("State of the optimizer of a ResNet-18", ["optimizer", "MiB", "/parameters"], [
        [row["optimizer"], f"{row['bytes'] / MEBI:.1f}", f"{row['parameters ratio']:.2f}"] for row in rows
    ])  # fmt: skip


def explanations(rows: list[dict[str, Any]]) -> Iterable[Table]:
    """What is alive at the peaks."""
    for row in rows:
        title = f"Alive at the peak: {row['work']}, batch {row['batch size']}"
        shares = [[name, f"{size / MEBI:.1f}"] for name, size in row["at peak"].items()]
        yield results_table(title, ["operation", "MiB"], shares)


def main() -> None:
    """Prints by how many bytes the resident memory rises: ``work batch-size threads``."""
    work, batch_size, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    small, large = works(2, cpu)[0], works(batch_size, cpu)[0]
    small[work]()  # loads what is loaded at the first call
    print(peak_resident_bytes(large[work]))


if __name__ == "__main__":
    main()
