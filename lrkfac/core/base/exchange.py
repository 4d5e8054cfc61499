"""Exchange of tensors that each belong to one process: to all from its owner, and sums to its owner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.collectives import all_gather, reduce_scatter
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.processes import CHUNK, Processes


class Form(NamedTuple):
    """The shape and dtype of a tensor that another process may have."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def from_owners(
    own: Mapping[int, Tensor], forms: Sequence[Form], owners: Sequence[int], processes: Processes, blank: Tensor
) -> list[Tensor]:
    """Return all tensors, each as its owner has it: one call for each dtype and ``CHUNK`` bytes.

    Each process hands over as many numbers as the one that has most.

    Args:
        own: Those of this process, by their place among all.
        forms: Of all tensors.
        owners: The rank of the owner of each.
        processes: All processes.
        blank: See ``blank``: a process that has none of the tensors hands over zeros, mapped over as the others' are.
    """
    tensors: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(form.dtype for form in forms):
        places = _places([form.dtype == dtype for form in forms], owners, processes.size)
        sizes = [[torch.Size(forms[i].shape).numel() for i in of_rank] for of_rank in places]
        length = max(sum(of_rank) for of_rank in sizes)
        missing = blank.new_zeros(length - sum(sizes[processes.rank]), dtype=dtype)
        row = torch.cat([*[own[i].reshape(-1) for i in places[processes.rank]], missing])[None]
        rows = [
            all_gather(row[:, first:last], processes.name, processes.size, processes.rank)
            for first, last in _ranges(length, CHUNK // dtype.itemsize)
        ]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        for of_rank, of_sizes, x in zip(places, sizes, joined.unbind(), strict=True):
            parts = x[: sum(of_sizes)].split(of_sizes)
            tensors.update({i: part.reshape(forms[i].shape) for i, part in zip(of_rank, parts, strict=True)})
    return [tensors[i] for i in range(len(forms))]


def to_owners(tensors: Sequence[Tensor], owners: Sequence[int], processes: Processes) -> dict[int, Tensor]:
    """Return the sums over processes of those tensors that this one owns, by their place: calls as in ``from_owners``.

    Args:
        tensors: Of the same shapes and dtypes on all processes.
        owners: The rank of the owner of each.
        processes: All processes.
    """
    sums: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = _places([x.dtype == dtype for x in tensors], owners, processes.size)
        flat = [[tensors[i].reshape(-1) for i in of_rank] for of_rank in places]
        length = max(sum(x.numel() for x in of_rank) for of_rank in flat)
        like = next(x for of_rank in flat for x in of_rank)
        padded = [[*row, like.new_zeros(length - sum(x.numel() for x in row))] for row in flat]
        rows = torch.cat([x for row in padded for x in row]).reshape(processes.size, length)
        parts = [
            reduce_scatter(rows[:, first:last], processes.name, processes.size, processes.rank)
            for first, last in _ranges(length, CHUNK // (dtype.itemsize * processes.size))
        ]
        own = places[processes.rank]
        sizes = [tensors[i].numel() for i in own]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        of_own = whole[: sum(sizes)].split(sizes)
        sums.update({i: x.reshape(tensors[i].shape) for i, x in zip(own, of_own, strict=True)})
    return sums


def blank(*given: Tensor | LazyMatrix | float) -> Tensor:
    """Return a zero ``[]`` over which ``vmap`` maps where it maps over one of the tensors.

    What is handed over must have the same axes on all processes, also where it depends on none of a process' tensors.
    """
    tensors = [x.left if isinstance(x, LazyMatrix) else x for x in given if isinstance(x, Tensor | LazyMatrix)]
    device = tensors[0].device
    zeros = [x.new_zeros((), dtype=torch.float32, device=device) for x in tensors]
    return zeros[0] if len(zeros) == 1 else torch.stack(zeros).sum()


def _places(chosen: Sequence[bool], owners: Sequence[int], size: int) -> list[list[int]]:
    """Return the places of chosen tensors of each rank."""
    return [[i for i, one in enumerate(chosen) if one and owners[i] == rank] for rank in range(size)]


def _ranges(length: int, limit: int) -> Iterator[tuple[int, int]]:
    for first in range(0, max(length, 1), limit):
        yield first, min(first + limit, length)
