"""Time of a refresh alone, update of both factors of a layer and their inverses, beside dense factors, by width.

python -m benchmarks.refresh
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import lrkfac
from benchmarks.common import (
    COLOURS,
    argument_parser,
    interleaved,
    median_ratios,
    results_table,
    wide_console,
    write_results,
)
from benchmarks.floors import Rates, cost, started
from benchmarks.ratio_tables import milliseconds
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.linalg.covariances import RowCovariance

MODULE = "benchmarks.refresh"
LIMITS = {2048: 1 / 50, 4096: 1 / 200}
"""Of our time over that of forming and inverting by Cholesky, by width."""
OURS, CHOLESKY, EIGEN = "low rank", "dense, Cholesky", "dense, eigenvectors"
DAMPING, DECAY = 1e-2, 0.95


def refresh(structure: KroneckerStructure, rows: tuple[Tensor, Tensor]) -> tuple[Callable[[], Any], Any]:
    """Takes one batch into both factors and inverts them; and what it reads."""
    (n, d_out), d_in = rows[0].shape, rows[1].shape[1]
    structure = structure.fitted(d_in, d_out)
    output, input = (RowCovariance(x, x.new_tensor(1 / n)) for x in rows)
    state = structure.update(structure.init(d_in, d_out, rows[0]), output, input, DECAY)

    def update_and_invert() -> Any:
        new = structure.update(state, output, input, DECAY)
        return new, structure.inverse(new, DAMPING)

    return update_and_invert, (state, rows)


def eigenvectors(rows: tuple[Tensor, Tensor]) -> tuple[Callable[[], Any], Any]:
    """The same with dense factors, inverted by way of their eigenvectors, as exact damping and EKFAC need them."""
    state = [x.mT @ x / x.shape[0] for x in rows]

    def update_and_invert() -> Any:
        new = [DECAY * old + (1 - DECAY) * (x.mT @ x / x.shape[0]) for old, x in zip(state, rows, strict=True)]
        return new, [torch.linalg.eigh(matrix) for matrix in new]

    return update_and_invert, (state, rows)


def works(width: int, batch_size: int, rank: int, dense: bool, eigen: bool, device: torch.device) -> dict[str, Any]:
    """Functions by name, with what they read, for rows whose moments fall off as 1, 1/2, 1/3, …"""
    torch.manual_seed(0)
    scale = torch.arange(1, width + 1, device=device).rsqrt()
    rows = tuple(torch.randn(batch_size, width, device=device) * scale[torch.randperm(width)] for _ in range(2))
    found = {
        OURS: refresh(
            lrkfac.structures.kronecker(
                lrkfac.structures.low_rank(rank), lrkfac.structures.low_rank_plus_diagonal(rank)
            ),
            rows,
        )
    }
    if dense:
        found[CHOLESKY] = refresh(
            lrkfac.structures.kronecker(lrkfac.structures.dense(), lrkfac.structures.dense()), rows
        )
    if eigen:
        found[EIGEN] = eigenvectors(rows)
    return found


def measured(found: dict[str, Any], rates: Rates, device: torch.device, repeats: int, compiled: bool) -> dict[str, Any]:
    """Seconds, floors and our time over that of the others."""
    floors = {name: cost(function, reads).floor(rates) for name, (function, reads) in found.items()}
    torch.compiler.reset()
    functions = {name: function for name, (function, _) in found.items()}
    if compiled:
        functions[OURS] = torch.compile(functions[OURS], fullgraph=True, dynamic=False)
    seconds = interleaved({OURS: functions[OURS]}, device, repeats, warmup=2)
    ratios = {}
    for name in (CHOLESKY, EIGEN):
        if name in functions:
            both = {OURS: functions[OURS], name: functions[name]}
            pairs = interleaved(both, device, max(1, repeats // 5), warmup=0)
            seconds[name], ratios[name] = pairs[name], median_ratios(pairs, name)[OURS]
    medians = {name: statistics.median(of_name) for name, of_name in seconds.items()}
    return {"seconds": medians, "floors": floors, "ratios": ratios}


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """Seconds and floors against the width."""
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    for colour, name in zip(COLOURS, (OURS, CHOLESKY, EIGEN), strict=False):
        some = [one for one in found if name in one["seconds"]]
        widths = [one["width"] for one in some]
        axis.plot(widths, [1e3 * one["seconds"][name] for one in some], marker="o", color=colour, label=name)
        axis.plot(widths, [1e3 * one["floors"][name] for one in some], linestyle=":", color=colour)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([one["width"] for one in found], [str(one["width"]) for one in found])
    axis.minorticks_off()
    axis.set_xlabel("width (dotted: the floors)")
    axis.set_ylabel("a refresh of one layer [ms]")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    widths = [512, 1024, 2048, 4096, 8192, 16384]
    add("--widths", type=int, nargs="+", default=widths, metavar="D", help="of inputs and outputs of the layer")
    add("--batch-size", type=int, default=128, metavar="N", help="rows per batch")
    add("--rank", type=int, default=32, metavar="R", help="of the factors")
    add("--repeats", type=int, default=10, metavar="N", help="timings of ours; the others are timed a fifth as often")
    add("--dense-up-to", type=int, default=4096, metavar="D", help="the largest width with dense factors")
    add("--eigen-up-to", type=int, default=2048, metavar="D", help="the largest width with their eigenvectors")
    add("--compile", action="store_true", help="time our refresh compiled; the dense ones are library calls")
    arguments = parser.parse_args()
    device, rates, described = started(MODULE, arguments)
    console, found = wide_console(), []
    for width in arguments.widths:
        with console.status(f"measuring width {width}"):
            dense, eigen = width <= arguments.dense_up_to, width <= arguments.eigen_up_to
            some = works(width, arguments.batch_size, arguments.rank, dense, eigen, device)
            found.append({"width": width, **measured(some, rates, device, arguments.repeats, arguments.compile)})
    how = "compiled" if arguments.compile else "eager"
    title = f"Update and inverse of both factors of a layer, rank {arguments.rank}, {arguments.batch_size} rows, {how}"
    headings = ["width", "ours [ms]", "floor", "Cholesky [ms]", "floor", "Cholesky /_ours", "at_least",
                "eigenvectors [ms]", "floor", "eigenvectors /_ours"]  # fmt: skip
    rows = []
    for one in found:
        of = {f"{kind} {name}": value for kind in ("seconds", "floors") for name, value in one[kind].items()}
        times = {name: f"{1 / one['ratios'][name]:.0f}" if name in one["ratios"] else "" for name in (CHOLESKY, EIGEN)}
        least = f"{1 / LIMITS[one['width']]:.0f}" if one["width"] in LIMITS else ""
        ours, cholesky, eigen = ([milliseconds(of, f"{kind} {name}") for kind in ("seconds", "floors")]
                                 for name in (OURS, CHOLESKY, EIGEN))  # fmt: skip
        rows.append([str(one["width"]), *ours, *cholesky, times[CHOLESKY], least, *eigen, times[EIGEN]])
    console.print(results_table(title, headings, rows))
    console.print(
        "Cholesky: the averages of a aᵀ and g gᵀ are formed, factored and inverted; eigenvectors: formed and decomposed"
    )
    console.print(described)
    content = {"environment": described, "limits": LIMITS, "widths": found}
    write_results(arguments.output / f"refresh_{how}_{device.type}.json", content, draw(found), console)


if __name__ == "__main__":
    main()
