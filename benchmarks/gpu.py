"""All that a GPU changes, in one command of under eight minutes: tests, steps, graphs, refreshes, memory, profile.

python -m benchmarks.gpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import gpu_parts
from benchmarks.common import RESULTS, argument_parser, command_of, environment, results_table, write_json, written
from benchmarks.gpu_report import Report

MODULE = "benchmarks.gpu"
PACKAGES = ("asdfghjkl", "curvlinops-for-pytorch", "triton")
GRACE = 5.0
"""Seconds beyond its time after which a part is stopped."""


SECONDS = 455.0
"""For all parts."""


class Part(NamedTuple):
    """A part with its share of the time, in seconds."""

    seconds: float
    measure: Callable[[Report, gpu_parts.Sizes, torch.device], None]


PARTS = {
    "steps": Part(60, gpu_parts.steps),
    "networks": Part(70, gpu_parts.networks_part),
    "refresh": Part(35, gpu_parts.refreshes),
    "adaptive": Part(35, gpu_parts.adaptive),
    "profile": Part(30, gpu_parts.profiles),
    "libraries": Part(30, gpu_parts.libraries),
    "tests": Part(95, gpu_parts.device_tests),
    "compiled": Part(90, gpu_parts.compiled),
}
"""In this order; what takes longest comes last, so that a machine which is slower than thought has the others."""


def measured_in_child(name: str, seconds: float, arguments: Namespace, folder: Path) -> dict[str, Any]:
    """What a part finds in a process of its own: a fault of one, such as CUDA's after an error, is not the others'."""
    path, start = folder / f"{name}.json", time.monotonic()
    command = [sys.executable, "-m", MODULE, "--part", name, "--until", str(start + seconds), "--report", str(path),
               "--device", arguments.device, "--threads", str(arguments.threads)]  # fmt: skip
    command += ["--small"] if arguments.small else []
    why = ""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds + GRACE, check=False)
        if run.returncode:
            why = f"exit code {run.returncode}: {' | '.join(run.stderr.strip().splitlines()[-3:])}"[:600]
    except subprocess.TimeoutExpired:
        why = f"stopped after {seconds + GRACE:.0f} s, with what there was"
    found = json.loads(path.read_text()) if path.exists() else {"tables": [], "notes": [], "measured": {}}
    found["notes"] += [why] if why else []
    return {**found, "seconds": time.monotonic() - start}


def run_part(arguments: Namespace) -> None:
    """The child's work."""
    report, device = Report(arguments.report, arguments.until), torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    sizes = gpu_parts.SMALL if arguments.small else gpu_parts.Sizes()
    PARTS[arguments.part].measure(report, sizes, device)


def shown(name: str, found: dict[str, Any], console: Console) -> None:
    """Prints tables and notes of a part."""
    console.rule(f"{name}, {found['seconds']:.0f} s")
    for table in found["tables"]:
        console.print(results_table(table["title"], table["headings"], table["rows"]))
    for note in found["notes"]:
        console.print(note, highlight=False, markup=False)


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    parser.set_defaults(device="cuda", output=Path(os.environ.get("OUT") or RESULTS))
    add = parser.add_argument
    add("--small", action="store_true", help="tiny sizes, to see that all of it runs")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--seconds", type=float, default=SECONDS, metavar="S", help="time for all parts")
    add("--part", choices=PARTS, help="measure one part in this process")
    add("--report", type=Path, help="where that part writes")
    add("--until", type=float, help="when that part ends, by the clock that counts from the start of the machine")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("device: expected one of this machine, got cuda; pass --device cpu --small to try the command")
    if arguments.part:
        run_part(arguments)
        return
    options = {name: value for name, value in vars(arguments).items() if name not in ("part", "report", "until")}
    described = environment(arguments.threads, device, PACKAGES) | command_of(MODULE, options)
    described |= {"CUDA": torch.version.cuda, "matmul precision": torch.get_float32_matmul_precision()}
    console, end = Console(record=True, width=150), time.monotonic() + arguments.seconds
    path = arguments.output / f"gpu_{'small_' if arguments.small else ''}{device.type}.json"
    content: dict[str, Any] = {"environment": described, "parts": {}}
    console.print(described)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.parts:
            seconds = min(PARTS[name].seconds, end - time.monotonic() - GRACE)
            if seconds <= GRACE:
                console.print(f"{name}: left out, for want of time", highlight=False)
                continue
            content["parts"][name] = measured_in_child(name, seconds, arguments, Path(folder))
            shown(name, content["parts"][name], console)
            write_json(path, content)  # what there is, should the rest be interrupted
            path.with_suffix(".txt").write_text(console.export_text(clear=False))
    written(path, console)
    written(path.with_suffix(".txt"), console)


if __name__ == "__main__":
    main()
