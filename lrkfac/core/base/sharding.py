"""Tensors whose parts lie in several processes: ``DTensor``, as ``fully_shard`` makes of parameters."""

from __future__ import annotations

import sys
from typing import Any

import optree
from torch import Tensor, nn

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.types import Tree


def shard_like(params: Tree, tree: Tree) -> Tree:
    """Return a tree with each leaf cut as its parameter is: no process sends anything, since all have the whole.

    Leaves that are cut already, or whose parameter is whole, pass.
    """

    def one(p: Any, x: Any) -> Any:
        if not is_sharded(p) or is_sharded(x):
            return x
        from torch.distributed.tensor import DTensor, Replicate  # takes as long to import as the rest of the package

        whole = x.dense() if isinstance(x, LazyMatrix) else x
        everywhere = [Replicate()] * p.device_mesh.ndim
        return DTensor.from_local(whole, p.device_mesh, everywhere, run_check=False).redistribute(
            p.device_mesh, p.placements
        )

    return optree.tree_map(one, params, tree)


def is_sharded(x: Any) -> bool:
    """Return whether something is a ``DTensor``."""
    plain = type(x) in (Tensor, nn.Parameter) or not isinstance(x, Tensor)
    return not plain and hasattr(x, "device_mesh") and hasattr(x, "placements")


def placements(x: Any) -> tuple[Any, ...]:
    """Return how a tensor is spread over each axis of its mesh of processes; ``()`` if it is no ``DTensor``."""
    return x.placements if is_sharded(x) else ()


def mesh_of(x: Any) -> Any:
    """Return the ``DeviceMesh`` of a ``DTensor``, ``None`` of anything else."""
    return x.device_mesh if is_sharded(x) else None


def reshard(module: nn.Module) -> None:
    """Leave each process its own part of the parameters under ``fully_shard``.

    After a pass without gradients the outermost module keeps whole ones, which no longer follow their parts.
    """
    for part in module.modules():
        if _is_wrapped(part, "FSDPModule"):
            part.reshard()  # type: ignore[operator]


def is_flattened(part: nn.Module) -> bool:
    """Return whether a module is ``FullyShardedDataParallel``, whose parameters are many in one row."""
    return _is_wrapped(part, "FullyShardedDataParallel")


def _is_wrapped(part: nn.Module, kind: str) -> bool:
    return isinstance(part, getattr(sys.modules.get("torch.distributed.fsdp"), kind, ()))


def local_parts(tree: Tree) -> Tree:
    """Return a tree of what lies in this process of each ``DTensor``, in the same memory; other leaves pass."""
    return optree.tree_map(lambda x: x.to_local() if is_sharded(x) else x, tree)
