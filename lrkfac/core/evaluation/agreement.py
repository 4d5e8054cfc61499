"""Whether the processes of a joint batch do the same; that none waits for another that has failed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DebugLevel, get_debug_level  # type: ignore[attr-defined]

from lrkfac.core.base.eager import has_values
from lrkfac.core.base.processes import Processes

FAILED = "failed with "
"""Start of the facts of a process whose evaluation raised an error."""


def mark(facts: str, processes: Processes, like: Tensor) -> Tensor:
    """Return zeros ``[size]`` with a number that stands for the facts in the place of this process.

    The sum over processes then has the numbers of all. They are exact in float32.
    """
    # Compiled code has no values to compare, and cannot take the checksum.
    number = 1 if torch.compiler.is_compiling() else zlib.crc32(facts.encode()) % 2**22 + 1
    place = torch.arange(processes.size, device=like.device) == processes.rank
    return place.to(like.dtype) * number


def check_marks(marks: Tensor, processes: Processes, facts: str) -> None:
    """Raise on all processes, where values are known, unless the facts of all are the same.

    Raises:
        ValueError: Names the ranks that differ, and in what.
    """
    if has_values(marks) and bool((marks != marks[0]).any()):
        check_facts(processes.exchange(facts))


def check_facts(every: list[str]) -> None:
    """Raise unless all facts are the same, those of all ranks in their order; see ``check_marks``."""
    failed = [f"rank {rank} {facts}" for rank, facts in enumerate(every) if facts.startswith(FAILED)]
    if failed:
        raise ValueError(f"evaluate: stopped on all {len(every)} ranks, since {'; '.join(failed)}")
    differing = [f"rank {rank} has {facts}" for rank, facts in enumerate(every) if facts != every[0]]
    if differing:
        raise ValueError(
            f"evaluate: expected the same on all {len(every)} ranks, but rank 0 has {every[0]}, "
            f"{', '.join(differing)}; take statistics on all ranks or on none, of the same layers"
        )


def check_counts(total: Tensor, processes: Processes) -> None:
    """Raise on all processes, where values are known, if nothing in the joint batch counts."""
    if has_values(total) and not total > 0:
        raise ValueError(
            f"evaluate: expected a joint batch in which something counts, got none on any of {processes.size} ranks: "
            "all parts are empty, or all their targets are ignored; leave the batch out on all ranks"
        )


def check_device(processes: Processes, device: torch.device, backends: Mapping[str, str]) -> None:
    """Raise unless the group has a backend for tensors of a device."""
    if processes.size > 1 and device.type not in backends:
        raise ValueError(
            f"group: expected a backend for tensors on {device.type!r}, as the parameters of rank {processes.rank} "
            f"are, got {dict(backends)}; call init_process_group('cpu:gloo,cuda:nccl'), or with that device's backend"
        )


def is_debugging() -> bool:
    """Return whether TORCH_DISTRIBUTED_DEBUG asks for checks in each step."""
    return bool(get_debug_level() != DebugLevel.OFF)


def failure(error: BaseException) -> str:
    """Return the facts of a process that failed."""
    return f"{FAILED}{type(error).__name__}: {error}"


class Agreement:
    """Agreement of the processes of an evaluator, made at its first evaluation; copies start without.

    Attributes:
        lengths: Of gradients whose rows are gathered, see ``joined``; ``None`` before the first evaluation.
        leaves: Zeros in the place of the parameters, which a process that refuses its own ones sums; none before.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self.lengths: dict[int, int] | None = None

    def __reduce__(self) -> tuple[type[Agreement], tuple[Any, ...]]:
        return Agreement, ()
