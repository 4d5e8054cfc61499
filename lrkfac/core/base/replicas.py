"""Checks that processes have the same: settings, and trees bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.processes import Processes, processes_of
from lrkfac.core.base.tree_checks import check_whole, paths
from lrkfac.core.base.types import Tree

_WORDS = {1: torch.int8, 2: torch.int16}
"""Integers of a size of entries; larger ones are several of 32 bits, since low bits of float64 are often zero."""


def check_replicas(tree: Tree, group: Any, what: str = "tree") -> None:
    """Raise unless a tree of tensors is the same on all processes of a group, bit for bit.

    All of them call it. It compares shapes, dtypes and a checksum of each leaf.

    Args:
        tree: Such as ``(params, state)``.
        group: A process group, or a ``DeviceMesh`` with one axis.
        what: Names the tree in the error.

    Raises:
        ValueError: On all processes, if trees differ: names the first leaf that does, and the ranks. If this
            process is none of the group.
        TypeError: If ``group`` is neither, or a leaf is a ``DTensor``.

    Examples:
        >>> import tempfile, torch, lrkfac
        >>> import torch.distributed as dist
        >>> store = dist.FileStore(tempfile.mktemp(), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> lrkfac.check_replicas({"weight": torch.ones(3)}, dist.group.WORLD)
        >>> dist.destroy_process_group()
    """
    check_whole(tree, optree.tree_leaves(tree), what)
    check_same(what, processes_of(group).exchange(fingerprints(tree)))


def check_same(what: str, every: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the facts of all ranks, by name, are equal; names the first that differs, and where."""
    for name in dict.fromkeys(name for of_rank in every for name in of_rank):
        values = [of_rank.get(name, "nothing") for of_rank in every]
        differing = [rank for rank, value in enumerate(values) if value != values[0]]
        if differing:
            others = ", ".join(f"rank {rank} has {values[rank]}" for rank in differing[:3])
            more = f" and {len(differing) - 3} more ranks differ" if len(differing) > 3 else ""
            raise ValueError(
                f"{what}: expected the same on all {len(every)} ranks, {name!r} differs: rank 0 has {values[0]}, "
                f"{others}{more}; start all ranks from the same numbers, as by the same seed or by "
                "torch.distributed.broadcast, and give them the same arguments"
            )


class Agreed:
    """Remembers of which groups all processes have been found to have the same settings; copies start anew."""

    def __init__(self) -> None:
        self._groups: set[str] = set()

    @staticmethod
    def new() -> Agreed | None:
        """Return one, and none within the compiler, which could not make it and where nothing is checked."""
        return None if torch.compiler.is_compiling() else Agreed()

    def check(self, what: str, facts: Callable[[], Mapping[str, Any]], processes: Processes) -> None:
        """Raise at the first call for a group unless facts are the same; within the compiler, nothing is checked.

        ``facts`` is called at that call alone.

        Raises:
            ValueError: On all processes; names what differs.
        """
        if processes.name not in self._groups and not torch.compiler.is_compiling():
            check_same(what, processes.exchange(facts()))
            self._groups.add(processes.name)

    def __reduce__(self) -> tuple[type[Agreed], tuple[Any, ...]]:
        return Agreed, ()


def fingerprints(tree: Tree) -> dict[str, str]:
    """Return shape, dtype and a checksum of each leaf, by its path."""
    return {path: _fingerprint(leaf) for path, leaf in zip(paths(tree), optree.tree_leaves(tree), strict=True)}


def _fingerprint(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    x = torch.view_as_real(leaf.detach()) if leaf.is_complex() else leaf.detach()
    row = x.clone(memory_format=torch.contiguous_format).reshape(-1)
    bits = row.view(_WORDS.get(x.element_size(), torch.int32)).to(torch.int64)
    places = torch.arange(bits.numel(), device=bits.device) % 65521 + 1  # a prime
    checksum = int((bits * places).sum()) % 2**64
    return f"{leaf.dtype} {list(leaf.shape)} with the checksum {checksum:x}"
