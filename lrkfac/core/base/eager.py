"""What is known, or allowed, only outside the compiler and the transformations of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor


def has_values(x: Tensor) -> bool:
    """Whether a look at the values costs no synchronisation and is possible at all."""
    wrapped = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not wrapped and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def changes_in_place() -> bool:
    """Whether a tensor just made may be changed in place: under ``vmap`` it may lack an axis that the change has."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None
