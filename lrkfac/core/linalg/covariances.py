"""Covariances known by their action: the protocol; covariances of rows, diagonal ones, sums, and over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.processes import Processes
from lrkfac.core.base.rows import with_ones


@runtime_checkable
class Covariance(Protocol):
    """A symmetric positive semi-definite ``[d, d]`` matrix known by its action: the seam between
    layers and structures. Where that is cheaper, ``of_rows(x)`` is ``x C`` and ``between(x)`` is ``x C xᵀ`` for ``x``
    ``[k, d]``.
    """

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return ``C V`` for ``V`` of shape ``[d, k]``."""
        ...

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``[d]``."""
        ...

    def trace(self) -> Tensor:
        """Return the trace, ``[]``."""
        ...

    def dense(self) -> Tensor:
        """Return the matrix itself, ``[d, d]``."""
        ...


@dataclass(frozen=True)
class RowCovariance:
    """``scale * Σ z zᵀ`` over rows ``z``; several may be stacked along leading axes.

    Attributes:
        rows: ``[*, n, d]``, or one column less where each row has a trailing 1.
        scale: ``[*]`` or ``[]``.
        joint: Whether rows have a trailing 1, which is not in ``rows``.
    """

    rows: Tensor
    scale: Tensor
    joint: bool = False

    def matvec(self, vectors: Float[Tensor, "*many d k"]) -> Float[Tensor, "*many d k"]:
        """Return ``C V``."""
        return self.of_rows(vectors.mT).mT

    def of_rows(self, x: Float[Tensor, "*many k d"]) -> Float[Tensor, "*many k d"]:
        """Return ``x C``: the matrix applied to each row of ``x``."""
        along = self._along(x) * self.scale[..., None, None]
        back = along @ self.rows
        return torch.cat([back, along.sum(dim=-1, keepdim=True)], dim=-1) if self.joint else back

    def between(self, x: Float[Tensor, "*many k d"]) -> Float[Tensor, "*many k k"]:
        """Return ``x C xᵀ``."""
        along = self._along(x)
        return (along * self.scale[..., None, None]) @ along.mT

    def diagonal(self) -> Float[Tensor, "*many d"]:
        """Return the diagonal."""
        squares = self.rows.square().sum(dim=-2)
        if self.joint:
            squares = torch.cat([squares, squares.new_full((*squares.shape[:-1], 1), self.rows.shape[-2])], dim=-1)
        return self.scale[..., None] * squares

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the trace."""
        squares = torch.linalg.vector_norm(self.rows, dim=(-2, -1)).square()  # without a copy of the rows
        return self.scale * (squares + self.joint * self.rows.shape[-2])

    def dense(self) -> Float[Tensor, "*many d d"]:
        """Return the matrix."""
        rows = with_ones(self.rows) if self.joint else self.rows
        return self.scale[..., None, None] * (rows.mT @ rows)

    def _along(self, x: Tensor) -> Tensor:
        return x[..., :-1] @ self.rows.mT + x[..., -1:] if self.joint else x @ self.rows.mT


@dataclass(frozen=True)
class DiagonalCovariance:
    """A diagonal matrix, such as that of one-hot rows, whose entries are counts."""

    entries: Tensor

    def matvec(self, vectors: Float[Tensor, "*many d k"]) -> Float[Tensor, "*many d k"]:
        """Return ``C V``."""
        return self.entries[..., None] * vectors

    def diagonal(self) -> Float[Tensor, "*many d"]:
        """Return the diagonal."""
        return self.entries

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the trace."""
        return self.entries.sum(dim=-1)

    def dense(self) -> Float[Tensor, "*many d d"]:
        """Return the matrix."""
        return torch.diag_embed(self.entries)


@dataclass(frozen=True)
class SumCovariance:
    """``Σ weights[i] * parts[i]``."""

    parts: tuple[Covariance, ...]
    weights: tuple[Tensor, ...]

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """Return ``C V``."""
        return self._sum(lambda part: part.matvec(vectors))

    def between(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
        """Return ``x C xᵀ``."""
        return self._sum(lambda part: between(part, x))

    def diagonal(self) -> Float[Tensor, "d"]:
        """Return the diagonal."""
        return self._sum(lambda part: part.diagonal())

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace."""
        return self._sum(lambda part: part.trace())

    def dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return self._sum(lambda part: part.dense())

    def _sum(self, of: Callable[[Covariance], Tensor]) -> Tensor:
        terms = [weight * of(part) for part, weight in zip(self.parts, self.weights, strict=True)]
        return torch.stack(terms).sum(dim=0)


@dataclass(frozen=True)
class SummedCovariance:
    """The sum over processes of a covariance of which each has a part; every answer is one sum."""

    part: Covariance
    processes: Processes

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """Return ``C V``."""
        return self._sum(self.part.matvec(vectors))

    def of_rows(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return ``x C``."""
        return self._sum(of_rows(self.part, x))

    def between(self, x: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
        """Return ``x C xᵀ``."""
        return self._sum(between(self.part, x))

    def diagonal(self) -> Float[Tensor, "d"]:
        """Return the diagonal."""
        return self._sum(self.part.diagonal())

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace."""
        return self._sum(self.part.trace())

    def dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return self._sum(self.part.dense())

    def _sum(self, answer: Tensor) -> Tensor:
        return self.processes.sum([answer])[0]


def of_rows(covariance: Covariance, x: Float[Tensor, "*many k d"]) -> Float[Tensor, "*many k d"]:
    """Return ``x C``: the matrix applied to each row of ``x``."""
    direct: Callable[[Tensor], Tensor] | None = getattr(covariance, "of_rows", None)
    return covariance.matvec(x.mT).mT if direct is None else direct(x)


def between(covariance: Covariance, x: Float[Tensor, "*many k d"]) -> Float[Tensor, "*many k k"]:
    """Return ``x C xᵀ``."""
    direct: Callable[[Tensor], Tensor] | None = getattr(covariance, "between", None)
    return x @ covariance.matvec(x.mT) if direct is None else direct(x)


def scaled(covariance: Covariance, factor: Float[Tensor, ""]) -> Covariance:
    """Return ``factor * C``."""
    if isinstance(covariance, RowCovariance):
        return replace(covariance, scale=factor * covariance.scale)
    if isinstance(covariance, DiagonalCovariance):
        return DiagonalCovariance(factor * covariance.entries)
    return SumCovariance((covariance,), (factor,))


class KroneckerFactors(NamedTuple):
    """The output factor ``B`` and the input factor ``A`` of a layer's block."""

    output: Covariance
    input: Covariance


def joined_rows(rows: list[Tensor]) -> Tensor:
    """Return the rows of all uses."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)
