"""What the operations inside a function allocate."""

import weakref

import optree
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Views that only broadcast hold no memory.
        sizes = [
            x.untyped_storage().nbytes() // x.element_size()
            for x in optree.tree_leaves(result)
            if isinstance(x, torch.Tensor)
        ]
        self.numel = max([self.numel, *sizes])
        return result


class MatrixCount(LargestTensor):
    """Counts the operations that make a matrix of a size, and notes the largest tensor of others."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_key(x) for x in optree.tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in optree.tree_leaves(result):
            if not isinstance(x, torch.Tensor) or _key(x) in given:
                continue
            held = x.untyped_storage().nbytes() // x.element_size()
            if held >= self.size:
                self.made += 1
            else:
                self.numel = max(self.numel, held)
        return result


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that tensors made inside hold at most at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {_key(x) for x in optree.tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        for x in optree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := _key(x)) not in given and key not in self.held:
                storage = x.untyped_storage()
                self.now += storage.nbytes()
                self.held[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key, size):
        del self.held[key]
        self.now -= size


def _key(x):
    return x.untyped_storage()._cdata
