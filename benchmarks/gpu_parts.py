"""What ``benchmarks.gpu`` measures, part by part; each runs in a process of its own and writes as it goes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import refresh
from benchmarks.common import interleaved, median_ratios
from benchmarks.floors import measured_rates
from benchmarks.gpu_profile import profiled
from benchmarks.gpu_report import Report
from benchmarks.networks import Work, gpt, perceptron
from benchmarks.networks import resnet18 as resnet
from benchmarks.ratio_tables import milliseconds, ratio
from benchmarks.ratios import ADAPTIVE, SGD, Choice, Method, low_rank, measured, methods
from benchmarks.resnet18 import ResNet18

ROOT = Path(__file__).parent.parent
MEBI = 2**20


class Sizes(NamedTuple):
    """What is measured: on a GPU, or small enough for any CPU."""

    widths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    compiled: tuple[int, ...] = (2048,)
    adaptive: tuple[int, ...] = (512, 1024, 2048)
    libraries: tuple[int, ...] = (1024, 2048)
    dense_up_to: int = 8192
    eigen_up_to: int = 4096
    batch: int = 128
    images: int = 256
    channels: tuple[int, ...] = (64, 128, 256, 512)
    gpt: tuple[int, int, int, int] = (12, 768, 12, 512)
    sequences: int = 8
    rank: int = 32
    repeats: int = 20
    tests: tuple[str, ...] = ("tests/device", "--numprocesses=6")


SMALL = Sizes(
    (16, 32), (), (16,), (16,), 32, 16, 8, 4, (4, 4, 8, 8), (1, 16, 2, 8), 2, 2, 2,
    ("tests/device/test_linear_algebra.py", "--numprocesses=0"),
)  # fmt: skip


def device_tests(report: Report, sizes: Sizes, device: torch.device) -> None:
    """The tests of the mark ``device``; those that compile come last, in the time that is left."""
    rows, printed = [], {}
    for marks in ("device and not slow", "device and slow"):
        start = time.monotonic()
        lines, code = pytest_run(marks, sizes.tests, device, max(1.0, report.end - start))
        rows.append([marks, lines[-1][:90] if lines else "", code, f"{time.monotonic() - start:.0f}"])
        printed[marks] = lines[-400:]
        report.table(f"Tests on {device}", ["tests", "result", "exit code", "s"], rows, printed)
        for line in [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:40]:
            report.note(line[:300])


def pytest_run(marks: str, tests: tuple[str, ...], device: torch.device, seconds: float) -> tuple[list[str], str]:
    """What it prints, and its exit code or that it was stopped."""
    command = [sys.executable, "-m", "pytest", "-m", marks, "-q", "--tb=short", *tests]
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False,
            env={**os.environ, "LRKFAC_TEST_DEVICE": str(device), "COLUMNS": "200"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode().splitlines(), f"stopped after {seconds:.0f} s"
    return run.stdout.splitlines(), str(run.returncode)


def networks(sizes: Sizes) -> dict[str, Callable[[torch.device], Work]]:
    """A ResNet-18 in float32 and a GPT in bfloat16."""

    def images(device: torch.device) -> Work:
        work = resnet(sizes.images, device)
        return work if sizes.channels[0] == 64 else work._replace(module=ResNet18(10, sizes.channels).to(device))

    def text(device: torch.device) -> Work:
        blocks, width, heads, context = sizes.gpt
        work = gpt(sizes.sequences, device, blocks, width, heads, context)
        return work._replace(module=work.module.to(torch.bfloat16))

    blocks, width, _, context = sizes.gpt
    return {
        f"ResNet-18, batch {sizes.images}, float32": images,
        f"GPT, {blocks} layers, width {width}, context {context}, batch {sizes.sequences}, bfloat16": text,
    }


def perceptrons(widths: tuple[int, ...], batch: int) -> dict[str, Callable[[torch.device], Work]]:
    """Three hidden layers."""
    return {f"width {width}, batch {batch}, float32": partial(perceptron, width, batch) for width in widths}


HEADINGS = ["step", "how", "ms", "floor", "/SGD", "refresh", "floor", "/SGD", "mean_of_10 /SGD", "peak [MiB]",
            "refresh peak [MiB]"]  # fmt: skip


def row_of(row: dict[str, Any], how: str) -> list[str]:
    """Of the table of steps."""
    peaks = ["" if row.get(key) is None else f"{row[key] / MEBI:.0f}" for key in ("peak", "refresh peak")]
    return [row["step"], how, milliseconds(row, "seconds"), milliseconds(row, "floor"), ratio(row, "ratio"),
            milliseconds(row, "refresh seconds"), milliseconds(row, "refresh floor"), ratio(row, "refresh ratio"),
            ratio(row, "mean ratio"), *peaks]  # fmt: skip


def of_each(
    report: Report, device: torch.device, works: dict[str, Callable[[torch.device], Work]], choice: Choice, graphs: bool
) -> None:
    """Steps of each network beside its SGD step: eager or compiled, then in CUDA graphs."""
    rates = measured_rates(device)
    how = "compiled" if choice.compiled else "eager"
    for title, make in works.items():
        if not report.has_time_for(title, 5):
            continue
        rows: list[list[str]] = []
        try:
            work = make(device)
            found = measured(work, choice, rates, device)
            rows += [row_of(row, how) for row in found["rows"]]
            report.table(title, HEADINGS, rows, found)
            for name, why in found["missing"].items():
                report.note(f"{title}: no {name}: {why}")
            if graphs and device.type == "cuda" and report.has_time_for(f"{title}, graphs", 5):
                in_graphs = graph_rows(work, choice, device)
                rows += [row_of(row, "graph") for row in in_graphs]
                report.table(title, HEADINGS, rows, {**found, "graphs": in_graphs})
        except Exception as error:  # whatever it is, the others go on
            report.failed(f"{title}, {how}", error)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """Captures a function of no arguments; the result of each replay stands where that of the capture stood."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, held = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        held.append(function())

    def replay() -> None:
        assert held  # the graph writes there
        graph.replay()

    return replay


def graph_rows(work: Work, choice: Choice, device: torch.device) -> list[dict[str, Any]]:
    """Plain steps as CUDA graphs, which equal the eager ones; a refresh waits for its factorisations, and is none."""
    cheap, _, _ = methods(work, replace(choice, dense=False))
    functions: dict[str, Callable[[], Any]] = {name: graphed(method.plain) for name, method in cheap.items()}
    seconds = interleaved(functions, device, choice.repeats)
    ratios = median_ratios(seconds, SGD)
    return [{"step": name, "seconds": statistics.median(each), "ratio": ratios[name]} for name, each in seconds.items()]


def steps(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Perceptrons, eager and in graphs."""
    choice = Choice((sizes.rank,), repeats=sizes.repeats, peaks=True)
    of_each(report, device, perceptrons(sizes.widths, sizes.batch), choice, graphs=True)


def networks_part(report: Report, sizes: Sizes, device: torch.device) -> None:
    """ResNet-18 and GPT, eager and in graphs."""
    choice = Choice((sizes.rank,), repeats=max(2, sizes.repeats // 2), peaks=True)
    of_each(report, device, networks(sizes), choice, graphs=True)


def compiled(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Compiled steps: the first calls take most of the time."""
    choice = Choice((sizes.rank,), repeats=max(2, sizes.repeats // 2), compiled=True)
    works = {**perceptrons(sizes.compiled, sizes.batch), **(networks(sizes) if sizes.compiled else {})}
    of_each(report, device, works, choice, graphs=False)


def adaptive(report: Report, sizes: Sizes, device: torch.device) -> None:
    """The adaptive chain beside a plain step of low rank."""
    choice = Choice((sizes.rank,), repeats=sizes.repeats, adaptive=True, peaks=True)
    of_each(report, device, perceptrons(sizes.adaptive, sizes.batch), choice, graphs=True)


def libraries(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Dense K-FAC, ASDL and curvlinops where they are installed."""
    choice = Choice((sizes.rank,), repeats=max(2, sizes.repeats // 2), dense=True, peaks=True)
    of_each(report, device, perceptrons(sizes.libraries, sizes.batch), choice, graphs=False)


def refreshes(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Update and inverse of both factors of a layer beside dense ones, by Cholesky and by eigenvectors."""
    rates, rows, all_found = measured_rates(device), [], []
    names = (refresh.OURS, refresh.CHOLESKY, refresh.EIGEN)
    headings = ["width", *(f"{name} [ms]" for name in names), *(f"{name} /_ours" for name in names[1:])]
    for width in sizes.widths:
        if not report.has_time_for(f"refresh, width {width}", 5):
            continue
        try:
            dense, eigen = width <= sizes.dense_up_to, width <= sizes.eigen_up_to
            works = refresh.works(width, sizes.batch, sizes.rank, dense, eigen, device)
            found = refresh.measured(works, rates, device, sizes.repeats, compiled=False)
        except Exception as error:
            report.failed(f"refresh, width {width}", error)
            continue
        others = [f"{1 / found['ratios'][name]:.1f}" if name in found["ratios"] else "" for name in names[1:]]
        rows.append([str(width), *(milliseconds(found["seconds"], name) for name in names), *others])
        all_found.append({"width": width, **found})
        report.table(f"Update and inverse of both factors, rank {sizes.rank}", headings, rows, all_found)


def profiles(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Kernels, gaps and waits of each kind of step."""
    headings = ["step", "kernels", "copies", "waits", "busy [us]", "idle [us]", "longest kernel [us]", "its name"]
    rows, all_found = [], {}
    works = {**perceptrons(sizes.adaptive[-1:], sizes.batch), **networks(sizes)}
    for title, make in works.items():
        if not report.has_time_for(f"profile: {title}", 5):
            continue
        try:
            cheap, _, _ = methods(make(device), Choice((sizes.rank,), adaptive=make is next(iter(works.values()))))
            for name, function in functions_of(cheap, sizes.rank).items():
                found = all_found[f"{title}: {name}"] = profiled(function, device)
                longest = found["longest"][0] if found["longest"] else ["", 0.0]
                numbers = [f"{found[key]:.0f}" for key in ("kernels", "copies", "waits")]
                numbers += [f"{found[f'microseconds {key}']:.0f}" for key in ("busy", "idle")]
                rows.append([f"{title.split(',')[0]}: {name}", *numbers, f"{longest[1]:.0f}", longest[0][:40]])
                report.table("Profile, per step", headings, rows, all_found)
        except Exception as error:
            report.failed(f"profile: {title}", error)


def functions_of(cheap: dict[str, Method], rank: int) -> dict[str, Callable[[], Any]]:
    """Plain and refresh steps by name."""
    found: dict[str, Callable[[], Any]] = {}
    for name in (SGD, low_rank(rank), ADAPTIVE):
        if name in cheap:
            found[name] = cheap[name].plain
            if (again := cheap[name].refresh) is not None:
                found[f"{name}, refresh"] = again
    return found
