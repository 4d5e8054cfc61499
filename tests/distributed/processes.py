"""Runs a function in several processes that form a group of torch.distributed, on gloo, without a network port."""

import pickle
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 30.0
"""Seconds that a process waits for the others: ranks that call different collectives fail and do not hang."""

PRELOADED = ["lrkfac", "pytest", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]


def run(function: Callable[..., Any], world: int, folder: Path, *arguments: Any, limit: float = 300.0) -> list[Any]:
    """``function(*arguments)`` in ``world`` processes; the results by rank, or the error of a rank with its traceback.

    The function is one of a module, arguments and results can be pickled. The first call imports torch; later
    ones start within a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = function, world, folder, arguments, list(warnings.filters)
    # From a server that has imported torch once, before it has threads; also what finding layers would import.
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    context = mp.start_processes(_process, shared, world, join=False, start_method="forkserver")
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"{function.__name__}: {world} processes did not end within {limit:g} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]


def _process(
    rank: int, function: Callable[..., Any], world: int, folder: Path, arguments: Any, filters: list[Any]
) -> None:
    # Warnings are errors here as in the tests that wait.
    warnings.resetwarnings()
    warnings.filters.extend(filters)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    try:
        result = function(*arguments)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    finally:
        dist.destroy_process_group()


def outcome(function: Callable[[], Any]) -> str:
    """The error of a call as text, empty where there is none: what a rank reports that should have been refused."""
    try:
        function()
    except Exception as error:
        return "".join(traceback.format_exception_only(error))
    return ""


def torchrun(module: str, *options: str) -> str:
    """What a module of this repository prints when torchrun starts it in two processes; what failed is in the error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    root = Path(__file__).parents[2]
    ended = subprocess.run([*command, *options], check=False, capture_output=True, text=True, cwd=root)
    assert ended.returncode == 0, f"{module} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout
