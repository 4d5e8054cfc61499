"""Processes in threads of one process, whose sums wait for each other: for tests without a process group."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class Meeting:
    """Where threads leave their tensors."""

    def __init__(self, size: int):
        self.barrier, self.left = threading.Barrier(size, timeout=60), [None] * size


@dataclass(frozen=True)
class Threads:
    """One of the processes: ``sum`` as of ``Processes``; ``calls`` are the numbers that each call has summed."""

    meeting: Meeting
    rank: int
    calls: list[int] = field(default_factory=list)

    def sum(self, tensors):
        self.calls.append(sum(x.numel() for x in tensors))
        self.meeting.left[self.rank] = tensors
        self.meeting.barrier.wait()
        shapes = [[x.shape for x in of_one] for of_one in self.meeting.left]
        totals = [torch.stack(parts).sum(dim=0) for parts in zip(*self.meeting.left, strict=True)]
        self.meeting.barrier.wait()
        assert shapes == [shapes[0]] * len(shapes)
        return totals


def in_lockstep(size: int, function: Callable[[Threads], Any]) -> tuple[list[Any], list[Threads]]:
    """What the function returns of each process, and the processes; the first error is raised."""
    meeting, results, errors = Meeting(size), [None] * size, []
    processes = [Threads(meeting, rank) for rank in range(size)]

    def run(rank: int) -> None:
        try:
            results[rank] = function(processes[rank])
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results, processes
