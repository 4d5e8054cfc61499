"""Dtypes of tensors, trees and lazy matrices: conversion, promotion, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.types import Tree


def wide(x: Any) -> Any:
    """Return ``x`` in at least float32, the lowest precision in which sums and factors are kept."""
    if isinstance(x, LazyMatrix):
        return LazyMatrix(wide(x.left), wide(x.right), x.dtype, tuple([(c, wide(t)) for c, t in x.terms]))
    return x if x.dtype in (torch.float32, torch.float64) else floating(x, torch.float32)


def floating(x: Any, dtype: torch.dtype) -> Any:
    """Return ``x`` in a dtype; integers and numbers pass, and a lazy matrix converts its parts, not its own dtype."""
    if isinstance(x, LazyMatrix):
        rows = floating(x.left, dtype), floating(x.right, dtype)
        return LazyMatrix(*rows, x.dtype, tuple([(c, floating(t, dtype)) for c, t in x.terms]))
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in a dtype, itself where it has it: also a conversion that changes nothing is a call, and traced."""
    return x if x.dtype == dtype else x.to(dtype)


def floating_dtype(x: Tree) -> torch.dtype:
    """Return the dtype of the first floating-point leaf of ``x``."""
    return next(leaf.dtype for leaf in tree_leaves(x) if leaf.is_floating_point())


def most_precise(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has none."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to which all of these promote."""
    first = dtypes[0]  # torch counts a promotion as an operation
    return first if all(dtype == first for dtype in dtypes) else reduce(torch.promote_types, dtypes)


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Run a block without ``torch.autocast`` on the device of a tensor, and with products of float32 in float32.

    bfloat16 and TF32 keep 8 and 11 bits, and would turn the sign of an inverse along its largest eigenvectors. The
    compiler reads the precision of products when it compiles: there, it stays that of the caller.
    """
    device = like.device.type
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with autocast, nullcontext() if torch.compiler.is_compiling() else _exact_products():
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    """Let no product of float32 be rounded, as ``torch.set_float32_matmul_precision`` allows."""
    backends = [b for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if b.fp32_precision != "ieee"]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
