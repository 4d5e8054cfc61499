"""``torch.compile`` as tests need it."""

from collections.abc import Callable
from typing import Any

import torch


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in one graph or not at all, run operation by operation.

    The tracer alone decides whether a function can be compiled as a whole and how often; what compiles the graph takes
    several times as long and is torch's. Steps that go through all of it: ``tests/test_compiled_step.py``.
    """
    return torch.compile(function, fullgraph=True, backend="eager")
