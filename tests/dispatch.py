"""What the operations inside a function allocate."""

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
