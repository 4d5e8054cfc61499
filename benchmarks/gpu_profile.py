"""Kernels, gaps and waits of a step, by ``torch.profiler``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import synchronize

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""Calls by which the host waits; ``cudaDeviceSynchronize`` is the end of the measurement."""
COPIES = ("Memcpy", "Memset")
LARGEST = 8
"""Kernels that are listed."""


def profiled(function: Callable[[], Any], device: torch.device, repeats: int = 2) -> dict[str, Any]:
    """Per call: kernels, copies and waits, the time in kernels and between them, and the kernels that take longest.

    On a CPU, a kernel is an operation that no other one calls, and the time between them is Python's.
    """
    for _ in range(2):
        function()
    synchronize(device)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            function()
        synchronize(device)
    # As recorded: the profiler's own list of events takes a hundred times as long to make.
    events = list(profiler.profiler.kineto_results.events())
    if on_cuda:
        ranges = ("lrkfac.", "ProfilerStep")
        work = [e for e in events if e.device_type() == DeviceType.CUDA and not e.name().startswith(ranges)]
    else:
        work = outermost([e for e in events if e.name().startswith("aten::")])
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in work)
    busy = covered(spans)
    times: Counter[str] = Counter()
    for e in work:
        times[e.name()] += e.duration_ns()
    copies = sum(e.name().startswith(COPIES) for e in work)
    return {
        "kernels": (len(work) - copies) / repeats,
        "copies": copies / repeats,
        "waits": sum(e.name() in WAITS for e in events) / repeats,
        "microseconds busy": busy / 1e3 / repeats,
        "microseconds idle": (max(end for _, end in spans) - spans[0][0] - busy) / 1e3 / repeats if spans else 0.0,
        "longest": [[name[:80], total / 1e3 / repeats] for name, total in times.most_common(LARGEST)],
    }


def outermost(events: list[Any]) -> list[Any]:
    """Events that begin after the end of all before."""
    found, end = [], 0
    for e in sorted(events, key=lambda e: (e.start_ns(), -e.duration_ns())):
        if e.start_ns() >= end:
            found.append(e)
            end = e.start_ns() + e.duration_ns()
    return found


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals, sorted by their beginnings."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
