"""What the operations inside a function allocate."""

import math
import weakref

import optree
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest new tensor below ``size``, and counts those that are not below."""

    def __init__(self, size=math.inf):
        super().__init__()
        self.size, self.made, self.numel = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {key for key, _, _ in _storages((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        sizes = [size for key, _, size in _storages(result) if key not in given]
        self.made += sum(size >= self.size for size in sizes)
        self.numel = max([self.numel, *[size for size in sizes if size < self.size]])
        return result


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that tensors made inside hold at most at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {key for key, _, _ in _storages((args, kwargs or {}))}
        for key, storage, _ in _storages(result):
            if key not in given and key not in self.held:
                self.now += storage.nbytes()
                self.held[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key, size):
        del self.held[key]
        self.now -= size


def _storages(tree):
    """Key, storage and number of elements of each tensor: views that only broadcast hold no memory."""
    storages = [
        (x.untyped_storage(), x.element_size()) for x in optree.tree_leaves(tree) if isinstance(x, torch.Tensor)
    ]
    return [(storage._cdata, storage, storage.nbytes() // size) for storage, size in storages]
