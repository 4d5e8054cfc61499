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

    def two_sided(self, gradient: Float[Tensor, "*many d_out d_in"]) -> Float[Tensor, "*many d_out d_in"]:
        """Return ``M vec(G)`` as a matrix, in O((r_A + r_B) d_in d_out).

        What the vectors span is taken from ``G`` one side after the other, and eigenvalues act on the parts. Their
        differences would not cancel but for rounding, which the rest, the largest of an inverse, would scale up.
        """
        u, v = self.output_vectors, self.input_vectors
        all_out, all_in = (w.shape[-2] == w.shape[-1] for w in (u, v))
        along_in = gradient @ v
        both = u.mT @ along_in
        right = u @ (self.kept * both)
        if not all_out:
            right = right + self.input[..., None, :] * (along_in - u @ both)
        if all_in:
            return right @ v.mT
        left = gradient - along_in @ v.mT
        along_out = u.mT @ left
        total = right @ v.mT + u @ (self.output[..., :, None] * along_out)
        return total if all_out else total + self.rest[..., None, None] * (left - u @ along_out)

    def of_outer_products(
        self, left: Float[Tensor, "*many n d_out"], right: Float[Tensor, "*many n d_in"]
    ) -> tuple[Tensor, Tensor]:
        """Return rows of which the product is ``two_sided(leftᵀ right)``, ``n + r_A + r_B`` at most, in O(n d r)."""
        u, v = self.output_vectors, self.input_vectors
        all_out, all_in = (w.shape[-2] == w.shape[-1] for w in (u, v))
        along_in = left.mT @ (right @ v)
        both = u.mT @ along_in
        total = u @ (self.kept * both)
        if not all_out:
            total = total + self.input[..., None, :] * (along_in - u @ both)
        lefts, rights = [total.mT], [v.mT]
        if not all_in:
            beside_in = right - (right @ v) @ v.mT
            lefts.append(u.mT)
            rights.append(self.output[..., :, None] * ((left @ u).mT @ beside_in))
            if not all_out:
                lefts.append(self.rest[..., None, None] * (left - (left @ u) @ u.mT))
                rights.append(beside_in)
        return torch.cat(lefts, dim=-2), torch.cat(rights, dim=-2)

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
        others_out, others_in = (_beside(w) for w in (u, v))
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

    def largest(self) -> Float[Tensor, ""]:
        """Return the largest eigenvalue."""
        (d_out, r_out), (d_in, r_in) = self.output_vectors.shape, self.input_vectors.shape
        groups = [self.kept.amax()]
        groups += [self.output.amax()] if r_in < d_in else []
        groups += [self.input.amax()] if r_out < d_out else []
        groups += [self.rest] if r_in < d_in and r_out < d_out else []
        return torch.stack(groups).amax()

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


def _beside(w: Tensor) -> Tensor:
    """Return ``I - W Wᵀ``; zero for complete vectors, where rounding would be scaled by numbers without a meaning."""
    if w.shape[0] == w.shape[1]:
        return torch.zeros_like(w)
    return torch.eye(w.shape[0], dtype=w.dtype, device=w.device) - w @ w.mT


def kron(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x ⊗ y``; unlike ``torch.kron`` for columns of any strides."""
    return (x[:, None, :, None] * y[None, :, None, :]).reshape(x.shape[0] * y.shape[0], -1)
