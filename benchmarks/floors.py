"""The least time that a computation can take on this machine, by its operations and by the bytes it must move."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import command_of, environment, held_bytes, synchronize, tree_bytes

COPIED = {"cpu": 2**27, "cuda": 2**30}
"""Bytes that are copied to measure the memory's rate."""
SIDES = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices that are multiplied to measure the rate of operations."""


def _square(power: int, factor: float) -> Callable[..., float]:
    def operations(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> float:
        batch = 1
        for size in shape[:-2]:
            batch *= size
        return factor * batch * shape[-1] ** power

    return operations


def _qr(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> float:
    *batch, m, n = shape
    k = min(m, n)
    # As much for the triangle, by Householder's vectors, as for the basis.
    return 4 * torch.Size(batch).numel() * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 / 3)


def _added(shape: Any, a: Any, b: Any, out_shape: Any = None, **kwargs: Any) -> float:
    return 2 * torch.Size(a).numel() * b[-1]


FORMULAS = {
    torch.ops.aten.linalg_cholesky_ex: _square(3, 1 / 3),
    torch.ops.aten.cholesky_inverse: _square(3, 2 / 3),
    torch.ops.aten._linalg_eigh: _square(3, 9),
    torch.ops.aten.linalg_qr: _qr,
    torch.ops.aten.addmm_: _added,
    torch.ops.aten.baddbmm_: _added,
}
"""Operations of what torch's counter leaves out (Golub & Van Loan, *Matrix Computations*; a product counts 2 n³)."""


class Rates(NamedTuple):
    """Operations and bytes per second."""

    operations: float
    bytes: float


def measured_rates(device: torch.device, repeats: int = 5) -> Rates:
    """The best rates, in float32, of a product of square matrices and of a copy (which reads and writes)."""
    side = SIDES[device.type]
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(a, b), device, repeats)
    copy = _fastest(lambda: target.copy_(source), device, repeats)
    return Rates(2 * side**3 / product, 2 * tree_bytes(source) / copy)


def started(
    module: str, arguments: argparse.Namespace, packages: Iterable[str] = ()
) -> tuple[torch.device, Rates, dict[str, Any]]:
    """The device of a benchmark that begins, its rates, and for the record what it is measured with."""
    device = torch.device(arguments.device)
    described = environment(arguments.threads, device, packages) | command_of(module, vars(arguments))
    rates = measured_rates(device)
    return device, rates, {
        **described, "operations per second": rates.operations, "bytes per second": rates.bytes
    }  # fmt: skip


def _fastest(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class Cost(NamedTuple):
    """Operations of products and factorisations, and bytes that are moved at least."""

    operations: float
    bytes: float

    def floor(self, rates: Rates) -> float:
        """Seconds: the longer of the two, which may overlap."""
        return max(self.operations / rates.operations, self.bytes / rates.bytes)


def cost(function: Callable[[], Any], reads: Any, again: Any = ()) -> Cost:
    """Counts the operations of one call; it reads ``reads`` once, ``again`` once more, and writes what it returns.

    Parameters, for one, are read on the way forward and on the way back.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as count:
        result = function()
    return Cost(count.get_total_flops(), held_bytes(reads) + held_bytes(again) + held_bytes(result, beside=reads))
