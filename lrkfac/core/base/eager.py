"""Questions that only eager code may answer with yes: are values at hand, may a new tensor change in place?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.private_torch import forward_level, is_transformed, transformation_level


def has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor can be looked at, and without a synchronisation."""
    wrapped = torch.compiler.is_compiling() or is_transformed(x)
    return not wrapped and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def changes_in_place() -> bool:
    """Return whether a new tensor may be changed in place: under ``vmap`` it may lack an axis that the change has."""
    return not torch.compiler.is_compiling() and transformation_level() is None


def in_one_call(*leaves: Any) -> bool:
    """Return whether one operation may change all leaves: plain tensors of one dtype and device, without derivatives.

    Operations on lists of tensors have no rule of ``vmap``, and no derivative with respect to a scale. The compiler
    joins operations by itself.
    """
    if len(leaves) < 2 or not is_plain_and_constant(leaves):
        return False
    return all(x.dtype == leaves[0].dtype and x.device == leaves[0].device for x in leaves)


def is_plain_and_constant(leaves: Sequence[Any]) -> bool:
    """Return whether leaves are tensors without behaviour of their own, of which no derivative is taken."""
    if torch.compiler.is_compiling() or transformation_level() is not None or forward_level() >= 0:
        return False
    return all(type(x) in PLAIN and not x.requires_grad for x in leaves)


PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors without behaviour of their own."""


def may_be_read(x: Tensor) -> bool:
    """Return whether a loop of a solver may look at a value to end early: outside of the compiler and ``torch.func``.

    On a GPU the host then waits for it.
    """
    if torch.compiler.is_compiling() or transformation_level() is not None:
        return False
    return type(x) in PLAIN and x.device.type != "meta"
