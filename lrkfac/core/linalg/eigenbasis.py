"""A symmetric matrix that is diagonal in the eigenbasis of a Kronecker product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from lrkfac.core.linalg.moments import Moments


class EigenbasisKronecker(NamedTuple):
    """A matrix that is diagonal in the basis of a Kronecker product; acts on ``vec(G)``, row-major.

    With orthonormal ``output_vectors`` ``u_i`` ``[d_out, r_B]`` and ``input_vectors`` ``v_j`` ``[d_in, r_A]``, the
    eigenvalue of ``u_i v_jᵀ`` is ``kept[i, j]``, that of ``u_i vᵀ`` is ``output[i]`` for each ``v`` orthogonal to all
    ``v_j``, that of ``u v_jᵀ`` is ``input[j]``, and elsewhere it is ``rest``. Closed under inversion. Where the vectors
    of a side are complete, numbers for directions orthogonal to them have no meaning, but the size of the others.
    """

    output_vectors: Tensor
    input_vectors: Tensor
    kept: Tensor
    output: Tensor
    input: Tensor
    rest: Tensor

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.output_vectors.shape[-2] * self.input_vectors.shape[-2]

    def two_sided(self, gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Return ``M vec(G)`` as a matrix, in O((r_A + r_B) d_in d_out)."""
        left, right = self.output_vectors.mT @ gradient, gradient @ self.input_vectors
        all_out, all_in = (w.shape[0] == w.shape[1] for w in (self.output_vectors, self.input_vectors))
        # Numbers without meaning are left out: large ones would not cancel but for rounding.
        output = torch.zeros_like(self.output) if all_in else self.output
        input = torch.zeros_like(self.input) if all_out else self.input
        rest = torch.zeros_like(self.rest) if all_in or all_out else self.rest
        both = (self.kept - output[:, None] - input + rest) * (left @ self.input_vectors)
        left = (output - rest)[:, None] * left + both @ self.input_vectors.mT
        return rest * gradient + self.output_vectors @ left + (right * (input - rest)) @ self.input_vectors.mT

    def of_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``."""
        return self.matvec(x.mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(self.output_vectors.shape[0], self.input_vectors.shape[0], -1)
        return vmap(self.two_sided, in_dims=-1, out_dims=-1)(columns).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        u, v = self.output_vectors, self.input_vectors
        others_out, others_in = (torch.eye(w.shape[0], dtype=w.dtype, device=w.device) - w @ w.mT for w in (u, v))
        basis = kron(u, v)
        return (
            (basis * self.kept.reshape(-1)) @ basis.mT
            + kron((u * self.output) @ u.mT, others_in)
            + kron(others_out, (v * self.input) @ v.mT)
            + self.rest * kron(others_out, others_in)
        )

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the eigenvalues."""
        (d_out, r_out), (d_in, r_in) = self.output_vectors.shape, self.input_vectors.shape
        more_out, more_in = d_out - r_out, d_in - r_in
        sides = self.output.sum() * more_in + self.input.sum() * more_out
        return self.kept.sum() + sides + self.rest * more_out * more_in

    def shifted(self, shift: float | Tensor) -> EigenbasisKronecker:
        """Return ``M + shift I``."""
        return self._replace(
            kept=self.kept + shift, output=self.output + shift, input=self.input + shift, rest=self.rest + shift
        )

    def moments(self, output_vectors: Float[Tensor, "o p"], input_vectors: Float[Tensor, "i q"]) -> Moments:
        """Return the moments of random ``G`` with ``E vec(G) vec(G)ᵀ = M``, along other orthonormal columns.

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


def kron(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x ⊗ y``; unlike ``torch.kron`` for columns of any strides."""
    return (x[:, None, :, None] * y[None, :, None, :]).reshape(x.shape[0] * y.shape[0], -1)
