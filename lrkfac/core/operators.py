"""Symmetric matrices that are applied without being formed, as NamedTuples of tensors.

Each class is a pytree for ``optree`` and ``torch.func`` alike. An operator knows ``matvec``, ``of_rows``,
``to_dense``, ``trace`` and ``shifted`` (``M + shift I``) and nothing more. Of the first three, several may be
stacked along leading axes: ``of_rows``, ``trace`` and ``shifted`` then take one argument for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from lrkfac.core.types import Moments


class Diagonal(NamedTuple):
    """``diag(diagonal)``, with ``diagonal`` ``[d]``."""

    diagonal: Tensor

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        return _times_rows(self.diagonal, x)

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """``x M``: the matrix applied to each row of ``x``."""
        return x * self.diagonal[..., None, :]

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return torch.diag_embed(self.diagonal)

    def trace(self) -> Float[Tensor, "*many"]:
        """The sum of the eigenvalues."""
        return self.diagonal.sum(dim=-1)

    def shifted(self, shift: float | Tensor) -> Diagonal:
        """``M + shift I``."""
        return Diagonal(self.diagonal + _over(shift, 1))


class Dense(NamedTuple):
    """A symmetric matrix held in full, ``[d, d]``."""

    matrix: Tensor

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        return self.matrix @ x

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """``x M``: the matrix applied to each row of ``x``."""
        return x @ self.matrix

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return self.matrix

    def trace(self) -> Float[Tensor, "*many"]:
        """The sum of the eigenvalues."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)

    def shifted(self, shift: float | Tensor) -> Dense:
        """``M + shift I``."""
        identity = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return Dense(self.matrix + _over(shift, 2) * identity)


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
        if x.ndim == 1:
            return self.diagonal * x + self.vectors @ inner
        return torch.addcmul(self.vectors @ inner, self.diagonal[:, None], x)

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """``x M``: the matrix applied to each row of ``x``, in O(n d r)."""
        inner = (x @ self.vectors) * self.values[..., None, :]
        return torch.addcmul(inner @ self.vectors.mT, x, self.diagonal[..., None, :])

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return (self.vectors * self.values) @ self.vectors.mT + torch.diag_embed(self.diagonal)

    def trace(self) -> Float[Tensor, "*many"]:
        """The sum of the eigenvalues."""
        return self.diagonal.sum(dim=-1) + (self.values * self.vectors.square().sum(dim=-2)).sum(dim=-1)

    def shifted(self, shift: float | Tensor) -> LowRankPlusDiagonal:
        """``M + shift I``."""
        return self._replace(diagonal=self.diagonal + _over(shift, 1))


class Kronecker(NamedTuple):
    """``output ⊗ input``: acts on ``vec(G)``, row-major, as ``output G input``."""

    output: Operator
    input: Operator

    def two_sided(self, gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """``output G input`` for a matrix ``G`` of the layer's shape."""
        return self.input.of_rows(self.output.matvec(gradient))

    def of_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """``x (output ⊗ input)``: applied to each row of ``x``."""
        return self.matvec(x.mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``(output ⊗ input) x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(x.shape[0], -1)
        d_out, d_in = dimension(self.output), dimension(self.input)
        left = self.output.matvec(columns.reshape(d_out, -1)).reshape(d_out, d_in, -1)
        both = self.input.matvec(left.transpose(0, 1).reshape(d_in, -1)).reshape(d_in, d_out, -1)
        return both.transpose(0, 1).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        return _kron(self.output.to_dense(), self.input.to_dense())

    def trace(self) -> Float[Tensor, "*many"]:
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


class CorrectedKronecker(NamedTuple):
    """Eigenvalues of their own in the basis of a Kronecker product; acts on ``vec(G)``, row-major.

    With orthonormal ``output_vectors`` ``u_i`` ``[d_out, r_B]`` and ``input_vectors`` ``v_j`` ``[d_in, r_A]``, the
    eigenvalue of ``u_i v_jᵀ`` is ``kept[i, j]``, that of ``u_i vᵀ`` is ``output[i]`` for each ``v`` orthogonal to all
    ``v_j``, that of ``u v_jᵀ`` is ``input[j]``, and elsewhere it is ``rest``. Closed under inversion. Where the vectors
    of a side are complete, the numbers for what is orthogonal to them have no meaning, but the size of the others.
    """

    output_vectors: Tensor
    input_vectors: Tensor
    kept: Tensor
    output: Tensor
    input: Tensor
    rest: Tensor

    def two_sided(self, gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """``M vec(G)`` as a matrix, in O((r_A + r_B) d_in d_out)."""
        left, right = self.output_vectors.mT @ gradient, gradient @ self.input_vectors
        all_out, all_in = (w.shape[0] == w.shape[1] for w in (self.output_vectors, self.input_vectors))
        # What has no meaning is left out: large, it would not cancel but for rounding.
        output = torch.zeros_like(self.output) if all_in else self.output
        input = torch.zeros_like(self.input) if all_out else self.input
        rest = torch.zeros_like(self.rest) if all_in or all_out else self.rest
        both = (self.kept - output[:, None] - input + rest) * (left @ self.input_vectors)
        left = (output - rest)[:, None] * left + both @ self.input_vectors.mT
        return rest * gradient + self.output_vectors @ left + (right * (input - rest)) @ self.input_vectors.mT

    def of_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """``x M``: the matrix applied to each row of ``x``."""
        return self.matvec(x.mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """``M x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(self.output_vectors.shape[0], self.input_vectors.shape[0], -1)
        return vmap(self.two_sided, in_dims=-1, out_dims=-1)(columns).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """The matrix."""
        u, v = self.output_vectors, self.input_vectors
        others_out, others_in = (torch.eye(w.shape[0], dtype=w.dtype, device=w.device) - w @ w.mT for w in (u, v))
        basis = _kron(u, v)
        return (
            (basis * self.kept.reshape(-1)) @ basis.mT
            + _kron((u * self.output) @ u.mT, others_in)
            + _kron(others_out, (v * self.input) @ v.mT)
            + self.rest * _kron(others_out, others_in)
        )

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the eigenvalues."""
        (d_out, r_out), (d_in, r_in) = self.output_vectors.shape, self.input_vectors.shape
        more_out, more_in = d_out - r_out, d_in - r_in
        sides = self.output.sum() * more_in + self.input.sum() * more_out
        return self.kept.sum() + sides + self.rest * more_out * more_in

    def shifted(self, shift: float | Tensor) -> CorrectedKronecker:
        """``M + shift I``."""
        return self._replace(
            kept=self.kept + shift, output=self.output + shift, input=self.input + shift, rest=self.rest + shift
        )

    def moments(self, output_vectors: Float[Tensor, "o p"], input_vectors: Float[Tensor, "i q"]) -> Moments:
        """Those of random ``G`` with ``E vec(G) vec(G)ᵀ = M``, along other orthonormal columns.

        With the squared cosines between old and new columns, and what they leave to 1, it is the diagonal of ``M`` in
        the new basis: of all operators of this form in that basis the nearest to ``M`` in Frobenius norm.
        """
        more_out, more_in = (w.shape[0] - w.shape[1] for w in (self.output_vectors, self.input_vectors))
        cos_out = (output_vectors.mT @ self.output_vectors).square()
        cos_in = (input_vectors.mT @ self.input_vectors).square()
        rest_out, rest_in = ((1 - cosines.sum(dim=1)).clamp(min=0) for cosines in (cos_out, cos_in))
        # For each column on one side, its eigenvalues along the columns of the other side and along what is left.
        output = cos_out @ self.output + self.rest * rest_out
        kept = cos_out @ self.kept + rest_out[:, None] * self.input
        along_in = self.kept.sum(dim=0) + self.input * more_out
        return Moments(
            kept @ cos_in.mT + output[:, None] * rest_in,
            kept.sum(dim=1) + output * more_in,
            cos_in @ along_in + rest_in * (self.output.sum() + self.rest * more_out),
            self.trace(),
        )


Operator = Diagonal | Dense | LowRankPlusDiagonal | Kronecker | CorrectedKronecker


def dimension(operator: Operator) -> int:
    """Number of rows of an operator."""
    if isinstance(operator, Kronecker):
        return dimension(operator.output) * dimension(operator.input)
    if isinstance(operator, CorrectedKronecker):
        return operator.output_vectors.shape[-2] * operator.input_vectors.shape[-2]
    return operator.matrix.shape[-1] if isinstance(operator, Dense) else operator.diagonal.shape[-1]


def mean_eigenvalue(operator: Operator) -> Tensor:
    """``[*]``. Of a product side by side: the product of two traces may be too large for a float32."""
    if isinstance(operator, Kronecker):
        return mean_eigenvalue(operator.output) * mean_eigenvalue(operator.input)
    return operator.trace() / dimension(operator)


def split_damping(operator: Kronecker, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """``(δ_A, δ_B)`` with ``δ_A δ_B = damping``, in proportion to the factors' mean eigenvalues.

    A factor that is zero says nothing about scale: then ``π = 1``. Elsewhere ``π`` is kept within
    1e-8 and 1e8.
    """
    mean_input, mean_output = mean_eigenvalue(operator.input), mean_eigenvalue(operator.output)
    known = (mean_input > 0) & (mean_output > 0)
    ratio = torch.where(known, mean_input, 1.0) / torch.where(known, mean_output, 1.0)
    pi = ratio.clamp(1e-16, 1e16).sqrt()
    root = damping**0.5
    return root * pi, root / pi


def _over(shift: float | Tensor, axes: int) -> float | Tensor:
    """A number for each of several operators, with axes of length 1 behind."""
    return shift[(..., *[None] * axes)] if isinstance(shift, Tensor) else shift


def _times_rows(scale: Tensor, x: Tensor) -> Tensor:
    return scale * x if x.ndim == 1 else scale[:, None] * x


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """``x ⊗ y``; unlike ``torch.kron`` for columns of any strides."""
    return (x[:, None, :, None] * y[None, :, None, :]).reshape(x.shape[0] * y.shape[0], -1)
