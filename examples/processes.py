"""The group of processes that torchrun starts, for the length of an example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def group_of_processes(*, of_one: bool = False) -> Iterator[torch.device]:
    """Form the group for a ``with`` block, and give the device of this process.

    Without torchrun there is none, or one of this process alone with ``of_one``.
    """
    launched = dist.is_torchelastic_launched()
    if not (launched or of_one):
        yield torch.device("cpu")
        return
    device = torch.device("cuda", dist.get_node_local_rank(0)) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
        # A thread of gloo may hold tensors of the last call, and needs the interpreter to let go of them: a process
        # that ends before is aborted ("terminate called without an active exception"). To wait gives it the chance.
        dist.barrier()
    finally:
        dist.destroy_process_group()
