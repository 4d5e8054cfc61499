"""Orthonormal bases of the span of columns, and the generic columns that iterations start from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.dtypes import most_precise
from lrkfac.core.base.hashing import GOLDEN

BY_CHOLESKY = frozenset({"cuda"})
"""Types of device on which bases are found by Cholesky factors of small matrices, in twice the precision.

There, QR takes one matrix of a stack after another, and many small kernels for each. On one CPU core QR took 0.11,
0.37, 1.5 and 12 ms, of 36 columns of length 512, 2048 and 8192 and of 132 of 2048; Cholesky factors took 0.25, 0.79, 13
and 16 ms. Of four stacked matrices of 36 such columns: 0.45, 1.7 and 18 ms against 1.3, 17 and 63 ms. That it is the
other way round on a GPU has not been measured.
"""


FIRST, STEP = 0x5BEBCA6B, 0x2C1B3C6D
"""Odd numbers: the place of the first of ``pseudo_random`` numbers, and the distance from one to the next."""


def orthonormal(columns: Float[Tensor, "*many d k"]) -> Float[Tensor, "*many d k"]:
    """Return an orthonormal basis whose first ``j`` vectors span the first ``j`` columns, for every ``j``.

    It is orthonormal to rounding even where columns are zero or dependent, which then get an arbitrary direction
    orthogonal to the others. By Householder reflections, or by Cholesky factors: see ``BY_CHOLESKY``.
    """
    if columns.device.type in BY_CHOLESKY and has_twice_the_precision(columns):
        return orthonormal_by_cholesky(columns)
    return torch.linalg.qr(columns).Q


def has_twice_the_precision(columns: Tensor) -> bool:
    """Return whether the device of a tensor computes in twice its precision."""
    return columns.dtype == torch.float32 and most_precise(columns.device) == torch.float64


def orthonormal_by_cholesky(columns: Float[Tensor, "*many d k"]) -> Float[Tensor, "*many d k"]:
    """Return what ``orthonormal`` does for float32, from triangular factors of ``k × k`` matrices in float64.

    Columns of length 1 are moved by as much as they are rounded, in generic directions, and a zero column becomes one:
    whatever they are, their condition is now at most about 1e9, that of their products 1e18. A shift of those, as in
    Fukaya et al. 2020 (arXiv 1809.11085), lets the first factor exist and leaves a condition of about 1e3; the second
    factor then needs no shift and is right to 1e-9. Nothing looks at values: of what is not finite come NaN.
    """
    d, k = columns.shape[-2:]
    limits = torch.finfo(torch.float64)
    rows = columns.mT.to(torch.float64)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    known = lengths > 0
    # Without order to the eye, in few operations: the digits of sines from the tenth on. Other rounding is no harm.
    places = torch.arange(1, d * k + 1, dtype=rows.dtype, device=rows.device)
    generic = torch.frac(1e9 * torch.sin(places)).reshape(k, d)
    moved = torch.where(known, torch.finfo(columns.dtype).eps, 1.0) * (3 / d) ** 0.5
    rows = torch.addcmul(rows / torch.where(known, lengths, 1.0), moved, generic)
    identity = torch.eye(k, dtype=rows.dtype, device=rows.device)
    for shift in (4 * k * (d + k) * limits.eps, 0.0):
        products = rows @ rows.mT
        factor = torch.linalg.cholesky_ex(products + shift * identity if shift else products).L
        rows = torch.linalg.solve_triangular(factor, identity.expand(factor.shape), upper=False) @ rows
    return rows.to(columns.dtype).mT


def margin(x: Tensor) -> float:
    """Return how far below 1 eigenvalues of ``W Wᵀ`` must stay for ``I - W Wᵀ`` to be positive definite after rounding.

    In float64 the ratio of eigenvalues that float32 can tell apart is far from the limit.
    """
    return (4 if x.dtype == torch.float64 else 32) * torch.finfo(x.dtype).eps


def pseudo_random(rows: int, columns: int, seed: Tensor) -> Float[Tensor, "*many d k"]:
    """Return numbers in [-1, 1] that depend on their place and on ``seed`` alone, float32.

    Start vectors need no quality beyond generic position, but must be pure and equal on every device, in eager and
    compiled code and under ``vmap``; hence integer arithmetic and not a random generator. Of ``x`` at equal distances
    it is ``y ⌊y / 2¹⁵⌋`` with ``y = x²``, modulo 2³²: few operations, where a hash takes fifteen. Of ``y`` alone, some
    square matrices are singular.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        seed: int64, ``[*]``: for each number of it, others.
    """
    if seed.device.type == "meta":  # shapes alone, for which torch would go through Python operation by operation
        return torch.empty(*seed.shape, rows, columns, dtype=torch.float32, device=seed.device)
    place = torch.arange(rows * columns, dtype=torch.int32, device=seed.device).reshape(rows, columns)
    key = (seed * GOLDEN + FIRST).to(torch.int32)  # of the lower half alone
    x = torch.add(key[..., None, None], place, alpha=STEP)
    square = x * x
    return (square * (square >> 15)).to(torch.float32) * 2**-31
