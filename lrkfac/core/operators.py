"""Symmetric matrices that are applied without being formed, as NamedTuples of tensors.

Each class is a pytree for ``optree`` and ``torch.func`` alike. An operator knows ``matvec``,
``to_dense``, ``trace`` and ``shifted`` (``M + shift I``) and nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Diagonal(NamedTuple):
    """``diag(diagonal)``, with ``diagonal`` ``[d]``."""

    diagonal: Tensor

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        return _times_rows(self.diagonal, x)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return torch.diag_embed(self.diagonal)

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues."""
        return self.diagonal.sum()

    def shifted(self, shift: float | Tensor) -> Diagonal:
        """``M + shift I``."""
        return Diagonal(self.diagonal + shift)


class Dense(NamedTuple):
    """A symmetric matrix held in full, ``[d, d]``."""

    matrix: Tensor

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        return self.matrix @ x

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return self.matrix

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues."""
        return self.matrix.diagonal().sum()

    def shifted(self, shift: float | Tensor) -> Dense:
        """``M + shift I``."""
        identity = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return Dense(self.matrix + shift * identity)


class LowRankPlusDiagonal(NamedTuple):
    """``V diag(values) Vᵀ + diag(diagonal)``.

    ``vectors`` ``[d, r]`` need not be orthonormal and ``values`` ``[r]`` may be negative, so that the
    class is closed under inversion; ``diagonal`` is ``[d]``.
    """

    vectors: Tensor
    values: Tensor
    diagonal: Tensor

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``, in O(d r k)."""
        inner = _times_rows(self.values, self.vectors.mT @ x)
        return _times_rows(self.diagonal, x) + self.vectors @ inner

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return (self.vectors * self.values) @ self.vectors.mT + torch.diag_embed(self.diagonal)

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues."""
        return self.diagonal.sum() + (self.values * self.vectors.square()).sum()

    def shifted(self, shift: float | Tensor) -> LowRankPlusDiagonal:
        """``M + shift I``."""
        return self._replace(diagonal=self.diagonal + shift)


class Kronecker(NamedTuple):
    """``output ⊗ input``: acts on ``vec(G)``, row-major, as ``output G input``."""

    output: Operator
    input: Operator

    def two_sided(self, gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """``output G input`` for a matrix ``G`` of the layer's shape."""
        return self.input.matvec(self.output.matvec(gradient).mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``(output ⊗ input) x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(x.shape[0], -1)
        d_out, d_in = dimension(self.output), dimension(self.input)
        left = self.output.matvec(columns.reshape(d_out, -1)).reshape(d_out, d_in, -1)
        both = self.input.matvec(left.transpose(0, 1).reshape(d_in, -1)).reshape(d_in, d_out, -1)
        return both.transpose(0, 1).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return torch.kron(self.output.to_dense().contiguous(), self.input.to_dense().contiguous())

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues."""
        return self.output.trace() * self.input.trace()

    def shifted(self, shift: float | Tensor) -> Kronecker:
        """``(output + δ_B I) ⊗ (input + δ_A I)`` with ``δ_A δ_B = shift``: factored Tikhonov damping.

        ``δ_A = π √shift`` and ``δ_B = √shift / π`` with ``π² = mean eigenvalue of the input factor /
        mean eigenvalue of the output factor`` (Martens & Grosse 2015, arXiv 1503.05671, section 6.3).
        It is not ``M + shift I``, which has no Kronecker form.
        """
        input_damping, output_damping = split_damping(self, shift)
        return Kronecker(self.output.shifted(output_damping), self.input.shifted(input_damping))


Operator = Diagonal | Dense | LowRankPlusDiagonal | Kronecker


def to_dense(operator: Operator) -> Float[Tensor, "d d"]:
    """The matrix that an operator stands for, ``[d, d]``: for tests and small problems."""
    return operator.to_dense()


def dimension(operator: Operator) -> int:
    """Number of rows of an operator."""
    if isinstance(operator, Kronecker):
        return dimension(operator.output) * dimension(operator.input)
    return operator.matrix.shape[-1] if isinstance(operator, Dense) else operator.diagonal.shape[-1]


def split_damping(operator: Kronecker, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """``(δ_A, δ_B)`` with ``δ_A δ_B = damping``, in proportion to the factors' mean eigenvalues.

    A factor that is zero says nothing about scale: then ``π = 1``. Elsewhere ``π`` is kept within
    1e-8 and 1e8.
    """
    mean_input = operator.input.trace() / dimension(operator.input)
    mean_output = operator.output.trace() / dimension(operator.output)
    known = (mean_input > 0) & (mean_output > 0)
    ratio = torch.where(known, mean_input, 1.0) / torch.where(known, mean_output, 1.0)
    pi = ratio.clamp(1e-16, 1e16).sqrt()
    root = damping**0.5
    return root * pi, root / pi


def _times_rows(scale: Tensor, x: Tensor) -> Tensor:
    return scale * x if x.ndim == 1 else scale[:, None] * x
