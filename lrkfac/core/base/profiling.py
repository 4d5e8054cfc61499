"""Named ranges for profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function


def profiled(name: str) -> AbstractContextManager[Any]:
    """Return a context that ``torch.profiler`` (and NVTX) shows as ``lrkfac.<name>``; empty under the compiler."""
    return nullcontext() if torch.compiler.is_compiling() else record_function(f"lrkfac.{name}")
