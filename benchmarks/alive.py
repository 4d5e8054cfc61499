"""Which tensors are alive when a computation holds the most memory."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).parent.parent / "lrkfac"


class Storage(NamedTuple):
    """Memory that an operation allocated: its bytes, the shape of the first tensor in it, and where."""

    nbytes: int
    operation: str
    shape: tuple[int, ...]
    place: str


class Alive(TorchDispatchMode):
    """Follows every storage that operations allocate until it is released.

    It sees what outlives an operation; buffers within one are the profiler's business (``peak_bytes``).

    Attributes:
        peak: The most bytes alive at one time.
        at_peak: What was alive then.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.now: dict[int, Storage] = {}
        self.peak = self.current = 0
        self.at_peak: list[Storage] = []
        self._known = {x.untyped_storage().data_ptr() for x in tree_leaves(known) if isinstance(x, Tensor)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, str(function))
        if self.current > self.peak:
            self.peak, self.at_peak = self.current, list(self.now.values())
        return result

    def _add(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.now or storage.data_ptr() in self._known:
            return
        self.now[key] = Storage(storage.nbytes(), operation, tuple(tensor.shape), _place())
        self.current += storage.nbytes()
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.current -= self.now.pop(key).nbytes


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame = frame.f_back
    return "model or autograd" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def alive_at_peak(function: Callable[[], Any], known: Any = ()) -> Alive:
    """Runs the function and follows its storages, but for those of the tensors ``known``."""
    with torch.no_grad(), Alive(known) as alive:
        result = function()
    del result
    return alive
