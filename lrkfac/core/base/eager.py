"""Questions that only eager code may answer with yes: are values at hand, may a new tensor change in place?"""

from __future__ import annotations

import torch
from torch import Tensor

from lrkfac.core.base.private_torch import is_transformed, transformation_level


def has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor can be looked at, and without a synchronisation."""
    wrapped = torch.compiler.is_compiling() or is_transformed(x)
    return not wrapped and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def changes_in_place() -> bool:
    """Return whether a new tensor may be changed in place: under ``vmap`` it may lack an axis that the change has."""
    return not torch.compiler.is_compiling() and transformation_level() is None
