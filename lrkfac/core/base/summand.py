"""A gradient of which each process has a part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrkfac.core.base.processes import Processes


@dataclass(frozen=True, eq=False)
class Summand:
    """This process' part of a tensor: the parts of all processes add up to it. ``optree`` sees a leaf.

    Attributes:
        part: In the dtype of sums.
        dtype: Of the tensor.
        processes: All processes.
    """

    part: Tensor
    dtype: torch.dtype
    processes: Processes

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.part.shape

    @property
    def device(self) -> torch.device:
        """The device of the part."""
        return self.part.device

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.part.ndim


def summed(summands: list[Summand]) -> list[Tensor]:
    """Return the tensors, in one call for all."""
    if not summands:
        return []
    sums = summands[0].processes.sum([one.part for one in summands])
    return [x.to(one.dtype) for x, one in zip(sums, summands, strict=True)]
