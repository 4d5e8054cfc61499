"""The standard form of a call that uses a weight, and what a parser of calls is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.layers.kind import Kind, Options
from lrkfac.core.layers.views import View


class Call(NamedTuple):
    """One use of a weight.

    Attributes:
        kind: The layer's kind.
        input: The input that multiplies the weight, ``[N, ...]``.
        weight: The weight, as the operation received it.
        bias: The bias that the operation adds, if there is one.
        options: The settings of the operation, which stay the same.
        turn: Steps from the weight to the matrix ``[groups * d_out, d_in]``.
    """

    kind: Kind
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options
    turn: View = ()


Known = Callable[[Any], bool]
"""From an argument to whether it is a parameter, or a view of one."""


Parser = Callable[..., Call | None]
"""From ``known`` and the arguments of a call to the use of a weight, ``None`` where there is none."""
