"""Memory: statistics of a ResNet-18, state of optimizers, peaks of steps, the largest width within a limit.

python -m benchmarks.memory
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.common import COLOURS, argument_parser, command_of, environment, wide_console, write_results
from benchmarks.memory_statistics import LIMIT as STATISTICS_LIMIT
from benchmarks.memory_statistics import explanations, measured, peaks_table, states, states_table
from benchmarks.memory_steps import (
    GIBI,
    LIMIT,
    LOW_RANK,
    MEBI,
    SGD,
    WIDTH_LIMIT,
    largest,
    largest_table,
    peaks,
    state_numbers,
    steps_table,
)

MODULE = "benchmarks.memory"
PARTS = ("statistics", "steps", "largest")


def draw(content: dict[str, Any]) -> Figure:
    """Bars of what was measured."""
    bars: list[tuple[str, list[str], list[float], float | None]] = []
    if "peaks" in content:
        names = [f"{row['work']}, batch {row['batch size']}" for row in content["peaks"]]
        ratios = [row["allocated ratio"] for row in content["peaks"]]
        bars.append(("statistics of a ResNet-18:\npeak / that of the gradient", names, ratios, STATISTICS_LIMIT))
        sizes = [row["bytes"] / MEBI for row in content["states"]]
        bars.append(("state for a ResNet-18 [MiB]", [row["optimizer"] for row in content["states"]], sizes, None))
    if "steps" in content:
        names = [f"{row['method']}, {row['width']}" for row in content["steps"]]
        ratios = [row["ratio"] for row in content["steps"]]
        bars.append(("peak of a step\n/ that of SGD with momentum", names, ratios, LIMIT))
    if content.get("largest"):
        wide = {row["method"]: row["width"] for row in content["largest"] if row["completes"]}
        bars.append(("largest width that completes", list(wide), list(wide.values()), WIDTH_LIMIT))
    figure = Figure(figsize=(4.5 * max(1, len(bars)), 3.4), dpi=150, layout="constrained")
    for axis, (label, names, values, limit), colour in zip(
        figure.subplots(1, max(1, len(bars)), squeeze=False)[0], bars, COLOURS[1:], strict=False
    ):
        axis.bar_label(axis.barh(names, values, color=colour), fmt="%.4g", padding=3)
        if limit is not None:
            axis.axvline(limit, color=COLOURS[0], linestyle="--", linewidth=1)
            label += f"\n(dashed: {limit}, the limit)"
        axis.set_xlabel(label)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--batch-sizes", type=int, nargs="+", default=[32, 128], metavar="N", help="images, for the statistics")
    add("--explain", action="store_true", help="also show which operations' results are alive at the peak")
    add("--widths", type=int, nargs="+", default=[2048, 8192], metavar="D", help="of the layers, for the steps")
    add("--dense-up-to", type=int, default=2048, metavar="D", help="the largest width with dense K-FAC")
    add("--batch-size", type=int, default=128, metavar="N", help="examples, for the steps")
    add("--rank", type=int, default=32, metavar="R", help="of the factors, for the steps")
    add("--largest", type=int, nargs="+", default=[16384, 18432], metavar="D", help="widths to try within the limit")
    add("--gibibytes", type=float, default=16, metavar="G", help="the limit")
    arguments = parser.parse_args()
    device, console = torch.device(arguments.device), wide_console()
    described = environment(arguments.threads, device) | command_of(MODULE, vars(arguments))
    content: dict[str, Any] = {"environment": described}
    options = {"batch_size": arguments.batch_size, "rank": arguments.rank, "device": arguments.device,
               "threads": arguments.threads}  # fmt: skip
    if "statistics" in arguments.parts:
        with console.status("measuring statistics"):
            content["peaks"] = [row for size in arguments.batch_sizes for row in measured(size, device)]
            content["states"] = states()
        console.print(peaks_table(content["peaks"]))
        console.print(
            "allocated: by the profiler (CUDA: by the allocator); alive: storages that outlive an operation; resident: "
            "of a process of its own. All with parameters and batch, without which nothing is computed: the floor is 1."
        )
        console.print(states_table(content["states"]))
        for table in explanations(content["peaks"]) if arguments.explain else ():
            console.print(table)
    if "steps" in arguments.parts:
        with console.status("measuring steps"):
            content["steps"] = peaks(arguments.widths, arguments.dense_up_to, **options)
            content["numbers"] = state_numbers(arguments.widths[0], arguments.rank)
        console.print(steps_table(content["steps"], arguments.batch_size, arguments.rank))
        numbers = content["numbers"]
        console.print(
            f"limit {LIMIT} at width 8192. Floor: parameters and state, old and new (in place: a gradient). Factors "
            f"and inverses of a layer of width {numbers['width']}: {numbers['numbers']:.0f} numbers, at most "
            f"(2r + 4)(d_in + d_out) = {numbers['promise']:.0f}"
        )
    if "largest" in arguments.parts:
        limit = int(arguments.gibibytes * GIBI)
        with console.status("looking for the largest width"):
            content["largest"] = largest(arguments.largest, limit, (LOW_RANK, SGD), **options)
        console.print(largest_table(content["largest"], limit))
        console.print(f"at least {WIDTH_LIMIT} must complete; the system refuses the process more")
    console.print(described)
    name = "memory" if set(arguments.parts) == set(PARTS) else "memory_" + "_".join(arguments.parts)
    write_results(arguments.output / f"{name}_{device.type}.json", content, draw(content), console)


if __name__ == "__main__":
    main()
