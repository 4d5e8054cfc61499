"""How all benchmarks measure and report: threads, versions, interleaved timings, peak memory, tables, files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import optree
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lrkfac

RESULTS = Path(__file__).parent / "results"
"""Where JSON and pictures go; they are part of the repository."""

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
"""Okabe & Ito's, which the colour-blind tell apart."""


def environment(threads: int, device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Fixes the number of threads, and says what a result was measured with."""
    torch.set_num_threads(threads)
    return {
        "python": platform.python_version(),
        "lrkfac": lrkfac.__version__,
        **{name: package_version(name) for name in ("torch", "optree", *packages)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load average": os.getloadavg()[0],
    }


def package_version(name: str) -> str:
    """The installed version, or that there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read afterwards counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = 10, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` per function, in rounds: what disturbs the machine disturbs all alike.

    The order turns from round to round, so that none always follows the same neighbour.
    """
    order = list(functions)
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(repeats):
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            functions[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    return seconds


def median_ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """The median over the rounds of each function's time over the reference's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(of_name, seconds[reference], strict=True))
        for name, of_name in seconds.items()
    }


def tree_bytes(tree: Any) -> int:
    """Bytes of the tensors of a tree."""
    return sum(x.numel() * x.element_size() for x in optree.tree_leaves(tree) if isinstance(x, Tensor))


def held_bytes(tree: Any, beside: Any = ()) -> int:
    """Bytes of memory that the tensors of a tree hold, beside those of another: shared memory counts once."""
    known, found = ({x.untyped_storage()._cdata: x for x in optree.tree_leaves(t) if isinstance(x, Tensor)}
                    for t in (beside, tree))  # fmt: skip
    return sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in known)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes allocated at one time during a call, beyond what was allocated before it.

    On CUDA from the allocator's counter, on the CPU from every allocation and release that ``torch.profiler``
    records. Buffers that libraries get from elsewhere (oneDNN's workspaces) are not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def peak_resident_bytes(function: Callable[[], Any]) -> int:
    """By how much the resident memory of this process rises at most during a call (Linux).

    In a process of its own, whose allocator has not kept memory of earlier calls.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def printed_by_child(module: str, *arguments: str) -> str:
    """What ``python -m module arguments`` prints; its allocator returns freed blocks to the system at once."""
    command = [sys.executable, "-m", module, *arguments]
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 150)


def results_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading.replace(" ", "\n"), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def argument_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """With what all tables have in common: device, threads, folder of the results."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure")
    add("--threads", type=int, default=2, metavar="N", help="CPU threads")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    return parser


def command_of(module: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, for the record."""
    shown = {name: value for name, value in options.items() if name != "output"}
    return {"command": f"python -m {module}", "options": shown, "started": time.strftime("%Y-%m-%d %H:%M:%S")}


def write_results(path: Path, content: Any, figure: Figure, console: Console) -> None:
    """Writes JSON and picture, and says so."""
    write_json(path, content)
    written(path, console)
    save_figure(path.with_suffix(".png"), figure, console)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all; lists of numbers stay on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(_pretty(content) + "\n")
    partial.replace(path)


def _pretty(content: Any, indent: int = 0) -> str:
    flat = json.dumps(content, allow_nan=True)
    inner = " " * (indent + 2)
    if isinstance(content, dict) and len(flat) + indent > 120:
        items = [f"{inner}{json.dumps(key)}: {_pretty(value, indent + 2)}" for key, value in content.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(content, list) and content and isinstance(content[0], (dict, list)):
        return "[\n" + ",\n".join(inner + _pretty(value, indent + 2) for value in content) + "\n" + " " * indent + "]"
    return flat


def save_figure(path: Path, figure: Figure, console: Console) -> None:
    """Writes the picture and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    written(path, console)


def written(path: Path, console: Console) -> None:
    """Says what was written, relative to the current folder where it lies within."""
    shown = path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path
    console.print(f"wrote {shown}", highlight=False, soft_wrap=True)
