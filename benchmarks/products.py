"""Multiplications of matrices in a step of one layer, beside its forward and backward pass: Muon, SOAP and ours.

python -m benchmarks.products --widths 256 1024 --batch 1024

Counted by torch's counter, a multiplication and an addition as two. QR and eigenpairs, which SOAP takes when it
renews its basis and we at a refresh, are no products and not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lrkfac
from benchmarks.methods import NO_MUON, NO_PACKAGE
from examples.report import positive

FORWARD_AND_BACKWARD = 6  # operations for each row and entry of the weight


def counted(function: Callable[[], object]) -> int:
    """Operations in products of matrices."""
    with FlopCounterMode(display=False) as counter, contextlib.redirect_stdout(io.StringIO()):
        function()
    return counter.get_total_flops()


def of_optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer], width: int) -> int:
    """Of a step in the middle of a training."""
    weight = torch.randn(width, width, requires_grad=True)
    optimizer = make([weight])
    for _ in range(3):
        weight.grad = torch.randn(width, width)
        optimizer.step()
    return counted(optimizer.step)


def of_ours(width: int, rank: int, batch: int) -> tuple[int, int]:
    """Of a step on old factors, and what a batch of statistics adds, without the backward pass that they need."""
    params, x = {"w": torch.randn(width, width)}, torch.randn(batch, width)
    model = lambda params, x: x @ params["w"].T  # noqa: E731
    layers = lrkfac.find_layers(model, params, x)
    evaluate, tx = lrkfac.evaluator(model, lrkfac.gaussian(), layers), lrkfac.orthogonalize_by_fisher(layers, rank)
    refresh, plain = (evaluate(params, x, torch.randn_like(x), statistics) for statistics in (True, False))
    state = tx.update(refresh.grads, tx.init(params), params, evaluation=refresh)[1]
    both = [counted(lambda e=e: tx.update(e.grads, state, params, evaluation=e)) for e in (plain, refresh)]
    return both[0], both[1] - both[0]


def rows(width: int, rank: int, batch: int) -> list[tuple[str, int]]:
    """Names and operations."""
    found = []
    if not NO_MUON:
        found.append(("Muon", of_optimizer(lambda leaves: torch.optim.Muon(leaves), width)))
    if not NO_PACKAGE:
        from pytorch_optimizer import SOAP

        found.append(("SOAP", of_optimizer(lambda leaves: SOAP(leaves, precondition_frequency=1000), width)))
        found.append(("SOAP, new basis", of_optimizer(lambda leaves: SOAP(leaves, precondition_frequency=1), width)))
    plain, statistics = of_ours(width, rank, batch)
    return [*found, ("ours", plain), ("ours, statistics", plain + statistics)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=positive, nargs="+", default=[256, 1024])
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=1024, help="rows (default: 1024)")
    arguments = parser.parse_args()
    table = Table("step", *[f"width {width}" for width in arguments.widths])
    columns = [rows(width, arguments.rank, arguments.batch) for width in arguments.widths]
    for entries in zip(*columns, strict=True):
        cells = []
        for width, (_, operations) in zip(arguments.widths, entries, strict=True):
            share = operations / (FORWARD_AND_BACKWARD * arguments.batch * width**2)
            cells.append(f"{operations / (2 * width**3):.2f} ({share:.2f})")
        table.add_row(entries[0][0], *cells)
    console = Console()
    console.print(table)
    console.print(
        "in products of two square matrices of the width (in passes forward and backward with "
        f"{arguments.batch} rows); rank {arguments.rank}"
    )


if __name__ == "__main__":
    main()
