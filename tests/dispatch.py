"""What the operations inside a function allocate."""

import math
import weakref
from collections import Counter

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


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_linalg_check_errors", "equal", "is_nonzero"}
"""Operations for whose result the host of a GPU waits."""


CHECKED = {"_linalg_eigh": 1, "linalg_eig": 1, "_linalg_svd": 1, "linalg_cholesky": 1}
"""Factorisations that look at their own success on the host."""


VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
    ),
    *(
        "split",
        "split_with_sizes",
        "unbind",
        "alias",
        "as_strided",
        "unfold",
        "diagonal",
        "lift_fresh",
        "_reshape_alias",
    ),
    *("empty", "empty_strided", "empty_like", "new_empty", "view_as_real"),
}
"""Operations that start no kernel."""


class Launches(TorchDispatchMode):
    """Counts kernels that a GPU would start, one for each operation that is no view, and waits of the host."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        picks = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in optree.tree_leaves(args[1])
        )
        if name in WAITS or name in CHECKED or picks:
            self.waits[name] += 1
        if name not in VIEWS:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))
