"""Whole tensors from parts that lie in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.processes import CHUNK, processes_of
from lrkfac.core.base.rows import padded
from lrkfac.core.base.sharding import is_sharded, mesh_of, placements
from lrkfac.core.base.types import Tree


def unshard(tree: Tree) -> Tree:
    """Gather the parts of each ``DTensor`` of a tree from all processes; other leaves pass.

    Everything in lrkfac computes on whole tensors, but for ``apply_updates``, which takes sharded parameters and whole
    updates. So a loop over a module under ``fully_shard`` gathers its parameters once in each step. All processes call
    it, with the same tree.

    Args:
        tree: Such as the parameters that ``from_module`` returns for a module under ``fully_shard``.

    Returns:
        A tree of the same structure, whose tensors are whole, equal in all processes, and require no gradient.

    Examples:
        >>> import torch, lrkfac
        >>> from torch import distributed
        >>> from torch.distributed.fsdp import fully_shard
        >>> distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        >>> net = torch.nn.Linear(3, 2)
        >>> _ = fully_shard(net, mesh=distributed.init_device_mesh("cpu", (1,)))
        >>> model, params = lrkfac.from_module(net)
        >>> type(params["weight"]).__name__, type(unshard(params)["weight"]).__name__
        ('DTensor', 'Tensor')
        >>> distributed.destroy_process_group()
    """
    leaves, structure = optree.tree_flatten(tree)
    batches: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if is_sharded(leaf):
            batches.setdefault(_batch_of(leaf), []).append(i)
    for key, numbers in batches.items():
        for some in [[i] for i in numbers] if key is None else _in_chunks(numbers, leaves):
            sharded = [leaves[i].detach() for i in some]
            whole = [x.full_tensor() for x in sharded] if key is None else _gathered(sharded, key[1])
            for i, x in zip(some, whole, strict=True):
                leaves[i] = x
    return optree.tree_unflatten(structure, leaves)


def _batch_of(x: Tensor) -> tuple[Any, int, torch.dtype] | None:
    """Return mesh, axis and dtype of a tensor that is cut into rows along one axis of its mesh; else ``None``.

    Tensors of which these are equal are gathered together. ``None`` also where ranks of the mesh are out of order, and
    under the compiler, which knows torch's own way.
    """
    mesh = mesh_of(x)
    cut = [i for i, place in enumerate(placements(x)) if not place.is_replicate()]
    rows = len(cut) == 1 and type(placements(x)[cut[0]]).__name__ == "Shard" and placements(x)[cut[0]].dim == 0
    if torch.compiler.is_compiling() or not rows or not x.numel() or not bool((mesh.mesh.flatten().diff() > 0).all()):
        return None
    return mesh, cut[0], x.dtype


def _in_chunks(numbers: Sequence[int], leaves: Sequence[Tensor]) -> Iterator[list[int]]:
    """Return numbers of leaves in lists whose whole tensors have ``CHUNK`` bytes at most, or that have one number."""
    chunk: list[int] = []
    size = 0
    for i in numbers:
        bytes_of_leaf = leaves[i].numel() * leaves[i].element_size()
        if chunk and size + bytes_of_leaf > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += bytes_of_leaf
    yield chunk


def _gathered(sharded: Sequence[Any], axis: int) -> list[Tensor]:
    """Return the whole of tensors that are cut into rows along one axis of a mesh, by one call.

    As ``torch.chunk`` cuts, each part has an equal number of rows, but for the last ones, which are shorter or empty.
    """
    processes = processes_of(mesh_of(sharded[0]).get_group(axis))
    lengths = [-(-x.shape[0] // processes.size) for x in sharded]
    parts = [padded(x.to_local(), length).reshape(-1) for x, length in zip(sharded, lengths, strict=True)]
    flat = torch.cat(parts)
    everything = processes.gather(flat, flat.shape[0]).view(processes.size, -1)
    pieces = everything.split([part.shape[0] for part in parts], dim=1)
    whole = [piece.contiguous() for piece in pieces]  # reshape() alone may leave views of all
    return [flat.reshape(-1, *x.shape[1:])[: x.shape[0]] for flat, x in zip(whole, sharded, strict=True)]
