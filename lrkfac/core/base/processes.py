"""Processes of a group, and the collective operations between them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lrkfac.core.base.collectives import all_gather, all_reduce, count_calls, register, reported
from lrkfac.core.base.rows import padded

CHUNK = 25 * 2**20
"""Bytes of one call at most, the size of the buckets of ``DistributedDataParallel``."""


@dataclass(frozen=True)
class Processes:
    """The processes of a group, of which this is one; made by ``processes_of``.

    It is copied and pickled by name.

    Attributes:
        name: The name of the group.
        rank: The number of this process in the group.
        size: The number of processes.
    """

    name: str
    rank: int
    size: int

    @property
    def ranks(self) -> list[int]:
        """The numbers of the processes among all, in the order of the group."""
        return list(dist.get_process_group_ranks(register.group(self.name)))

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of each tensor over processes, bit for bit the same on all of them.

        One call for each dtype and ``CHUNK`` bytes; all processes call it with tensors of the same shapes and dtypes.
        """
        if self.size == 1:
            return list(tensors)
        totals: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            chosen = [i for i, x in enumerate(tensors) if x.dtype == dtype]
            of_dtype = self._sum_of_one_dtype([tensors[i] for i in chosen])
            totals.update(zip(chosen, of_dtype, strict=True))
        return [totals[i] for i in range(len(tensors))]

    def gather(self, rows: Tensor, length: int) -> Tensor:
        """Return the rows ``[n, *]`` of all processes, padded to ``[length, *]`` with zeros each, one after another."""
        part = padded(rows, length)
        return part if self.size == 1 else all_gather(part, self.name, self.size, self.rank)

    def exchange(self, message: Any) -> list[Any]:
        """Return the messages of all processes, objects that pickle; on the host, outside of the compiler.

        Not by ``torch.distributed.all_gather_object``, which needs NumPy.
        """
        if self.size == 1:
            return [message]
        device = self._device_of_messages()
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8).to(device)
        with reported("an exchange of settings", self.name) as group:
            sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
            dist.all_gather(sizes, torch.full_like(sizes[0], len(data)), group=group)
            lengths = [int(size) for size in sizes]
            rows = [data.new_zeros(max(lengths)) for _ in lengths]
            dist.all_gather(rows, padded(data, max(lengths)), group=group)
        return [pickle.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    @property
    def backends(self) -> dict[str, str]:
        """The backend of the group for tensors of each type of device."""
        config = str(dist.get_backend_config(register.group(self.name)))
        return dict(pair.split(":") for pair in config.split(","))

    def _device_of_messages(self) -> torch.device:
        kinds = list(self.backends)
        if "cpu" in kinds:
            return torch.device("cpu")
        return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())

    def _sum_of_one_dtype(self, tensors: list[Tensor]) -> list[Tensor]:
        pieces: list[list[Tensor]] = [[] for _ in tensors]
        for chunk in _chunks([x.numel() for x in tensors], CHUNK // tensors[0].element_size()):
            flat = [tensors[i].reshape(-1)[first:last] for i, first, last in chunk]
            total = all_reduce(flat[0] if len(flat) == 1 else torch.cat(flat), self.name)
            for (i, _, _), part in zip(chunk, total.split([x.numel() for x in flat]), strict=True):
                pieces[i].append(part)
        whole = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in pieces]
        return [flat.reshape(x.shape) for flat, x in zip(whole, tensors, strict=True)]


class Among(NamedTuple):
    """The place of a process among those of a joint batch.

    Attributes:
        processes: All of them.
        size: Of the examples of which this process has statistics, see ``Evaluation``, ``[]``.
        total: That of all processes, ``[]``.
    """

    processes: Processes
    size: Tensor
    total: Tensor

    @property
    def share(self) -> Tensor:
        """The share that this process has, ``[]``; shares add up to 1."""
        return self.size / self.total.clamp(min=1)


def processes_of(group: Any, argument: str = "group") -> Processes:
    """Return the processes of a ``torch.distributed.ProcessGroup`` or of a ``DeviceMesh`` with one axis, or themselves.

    Raises:
        TypeError: If ``group`` is something else.
        ValueError: If this process is none of the group, or a mesh has several axes.
    """
    if isinstance(group, Processes):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{argument}: expected a mesh with one axis, along which batches differ, got the axes "
                f"{group.mesh_dim_names or group.ndim}; pass one of them, as in mesh['data']"
            )
        group = group.get_group()
    known = dist.is_available() and isinstance(group, dist.ProcessGroup)
    if (known and dist.get_rank(group) < 0) or (dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER):
        raise ValueError(
            f"{argument}: expected a group of which this process is one, got one without rank {dist.get_rank()}; give "
            "each process a group that it is in"
        )
    if not known:
        raise TypeError(
            f"{argument}: expected a torch.distributed process group, such as torch.distributed.group.WORLD, or a "
            f"DeviceMesh, both after init_process_group(), got {group!r}"
        )
    return Processes(register.add(group), dist.get_rank(group), dist.get_world_size(group))


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Count the calls within: a list of the operation and the bytes that this process handed to it, for each."""
    calls: list[tuple[str, int]] = []
    with count_calls(lambda operation, size: calls.append((operation, size))):
        yield calls


def _chunks(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Return ranges ``(tensor, first, last)`` of entries in lists of at most ``limit`` entries."""
    chunk: list[tuple[int, int, int]] = []
    room = limit
    for i, size in enumerate(sizes):
        first = 0
        while first < size or size == first == 0:
            last = min(size, first + room)
            chunk.append((i, first, last))
            room -= last - first
            if not room:
                yield chunk
                chunk, room = [], limit
            if last == size:
                break
            first = last
    if chunk:
        yield chunk
