"""Symmetric matrices of which one factor's eigenvectors are known: low rank plus isotropic, and products with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from lrkfac.core.linalg.operators import Dense, Diagonal, LowRankPlusDiagonal
from lrkfac.core.linalg.products import of_columns


class LowRankPlusIsotropic(NamedTuple):
    """``V diag(values) Vᵀ + rest (I - V Vᵀ)`` with orthonormal ``V``: eigenpairs, and one number for all others.

    Closed under inversion, which takes no decomposition. Where the vectors are complete, ``rest`` has no effect.

    Attributes:
        vectors: ``V``, ``[d, r]``, orthonormal; that is not checked.
        values: ``[r]``.
        rest: ``[]``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import LowRankPlusIsotropic
        >>> LowRankPlusIsotropic(torch.eye(3)[:, :1], torch.tensor([5.0]), torch.tensor(2.0)).matvec(torch.ones(3))
        tensor([5., 2., 2.])
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.vectors.shape[-2]

    @property
    def is_complete(self) -> bool:
        """Whether the vectors are all that there are."""
        return self.vectors.shape[-1] == self.vectors.shape[-2]

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``, in O(d r k)."""
        along = self.vectors.mT @ x
        if x.ndim == 1:
            scaled, rest = self.vectors @ (self.values * along), self.rest
        else:
            scaled, rest = self.vectors @ (self.values[..., None] * along), self.rest[..., None, None]
        return scaled if self.is_complete else scaled + rest * (x - self.vectors @ along)

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``, in O(n d r)."""
        along = x @ self.vectors
        scaled = (along * self.values[..., None, :]) @ self.vectors.mT
        return scaled if self.is_complete else scaled + self.rest[..., None, None] * (x - along @ self.vectors.mT)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return self.of_rows(torch.eye(self.dimension, dtype=self.vectors.dtype, device=self.vectors.device))

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the sum of the eigenvalues."""
        return self.values.sum(dim=-1) + (self.dimension - self.vectors.shape[-1]) * self.rest

    def shifted(self, shift: float | Tensor) -> LowRankPlusIsotropic:
        """Return ``M + shift I``."""
        each = shift[..., None] if isinstance(shift, Tensor) else shift
        return self._replace(values=self.values + each, rest=self.rest + shift)


class EigenspaceKronecker(NamedTuple):
    """``Σⱼ outputⱼ ⊗ vⱼ vⱼᵀ + output_r ⊗ (I - V Vᵀ)`` with orthonormal ``V``; acts on ``vec(G)``, row-major.

    A Kronecker product ``B ⊗ A`` with the eigenvectors ``vⱼ`` of ``A`` has this form, ``outputⱼ = aⱼ B``. So has it
    with a multiple of the identity added, and the inverse of that. Closed under ``shifted`` and inversion.

    Attributes:
        output: ``r + 1`` stacked operators of dimension ``d_out``, the last one for all directions orthogonal to ``V``;
            ``r`` where the vectors are complete. As ``LowRankPlusDiagonal`` of rank ``k``, ``(r + 1) d_out (k + 2)``
            numbers.
        input_vectors: ``V``, ``[d_in, r]``.
    """

    output: Diagonal | Dense | LowRankPlusDiagonal
    input_vectors: Tensor

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.output.dimension * self.input_vectors.shape[-2]

    @property
    def is_complete(self) -> bool:
        """Whether the vectors are all that there are."""
        return self.input_vectors.shape[-1] == self.input_vectors.shape[-2]

    def two_sided(self, gradient: Float[Tensor, "*many d_out d_in"]) -> Float[Tensor, "*many d_out d_in"]:
        """Return ``M vec(G)`` as a matrix, in O((r + k) d_in d_out).

        What the rest acts on is ``G - G V Vᵀ``. Differences of operators would not cancel but for rounding, which the
        rest, the largest of an inverse, would scale up.
        """
        vectors = self.input_vectors
        along = gradient @ vectors
        total = self.of_along(along) @ vectors.mT
        return total if self.is_complete else of_columns(self._rest(), gradient - along @ vectors.mT) + total

    def of_along(self, along: Float[Tensor, "*many d_out r"]) -> Float[Tensor, "*many d_out r"]:
        """Return ``outputⱼ xⱼ`` for each column ``xⱼ``."""
        each = self._narrowed(self.input_vectors.shape[-1])
        return each.of_rows(along.mT[..., None, :]).squeeze(-2).mT

    def of_outer_products(
        self, left: Float[Tensor, "*many n d_out"], right: Float[Tensor, "*many n d_in"]
    ) -> tuple[Tensor, Tensor]:
        """Return rows of which the product is ``two_sided(leftᵀ right)``, at most ``n + r``, without forming it."""
        along = right @ self.input_vectors
        lefts, rights = [self.of_along(left.mT @ along).mT], [self.input_vectors.mT]
        if not self.is_complete:
            lefts.append(self._rest().of_rows(left))
            rights.append(right - along @ self.input_vectors.mT)
        return torch.cat(lefts, dim=-2), torch.cat(rights, dim=-2)

    def of_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``."""
        return self.matvec(x.mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(self.output.dimension, self.input_vectors.shape[0], -1)
        return vmap(self.two_sided, in_dims=-1, out_dims=-1)(columns).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        identity = torch.eye(self.dimension, dtype=self.input_vectors.dtype, device=self.input_vectors.device)
        return self.matvec(identity)

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the eigenvalues."""
        traces, (d, r) = self.output.trace(), self.input_vectors.shape
        return traces[:r].sum() + (d - r) * traces[r:].sum()

    def largest(self) -> Float[Tensor, ""]:
        """Return the largest eigenvalue; an upper bound where outputs are not diagonal."""
        if isinstance(self.output, Dense):
            return torch.linalg.matrix_norm(self.output.matrix, torch.inf).amax()
        largest = self.output.diagonal.amax(dim=-1)
        if isinstance(self.output, LowRankPlusDiagonal):
            vectors, values, _ = self.output
            largest = largest + (values.clamp(min=0) * vectors.square().sum(dim=-2)).sum(dim=-1)
        return largest.amax()

    def shifted(self, shift: float | Tensor) -> EigenspaceKronecker:
        """Return ``M + shift I``."""
        return self._replace(output=self.output.shifted(shift))

    def _narrowed(self, r: int) -> Any:
        axis = self.input_vectors.ndim - 2
        return optree.tree_map(lambda x: x.narrow(axis, 0, r), self.output)

    def _rest(self) -> Any:
        axis, r = self.input_vectors.ndim - 2, self.input_vectors.shape[-1]
        return optree.tree_map(lambda x: x.select(axis, r), self.output)


class TransposedKronecker(NamedTuple):
    """A matrix that acts on ``vec(Gᵀ)`` as another does on ``vec(G)``: the roles of input and output change places.

    Attributes:
        transposed: The other, whose output is this one's input.
    """

    transposed: EigenspaceKronecker

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.transposed.dimension

    def two_sided(self, gradient: Float[Tensor, "*many d_out d_in"]) -> Float[Tensor, "*many d_out d_in"]:
        """Return ``M vec(G)`` as a matrix."""
        return self.transposed.two_sided(gradient.mT).mT

    def of_outer_products(
        self, left: Float[Tensor, "*many n d_out"], right: Float[Tensor, "*many n d_in"]
    ) -> tuple[Tensor, Tensor]:
        """Return rows of which the product is ``two_sided(leftᵀ right)``, without forming it."""
        right, left = self.transposed.of_outer_products(right, left)
        return left, right

    def of_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``."""
        return self.matvec(x.mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(self.transposed.input_vectors.shape[0], self.transposed.output.dimension, -1)
        return vmap(self.two_sided, in_dims=-1, out_dims=-1)(columns).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        like = self.transposed.input_vectors
        return self.matvec(torch.eye(self.dimension, dtype=like.dtype, device=like.device))

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the eigenvalues."""
        return self.transposed.trace()

    def largest(self) -> Float[Tensor, ""]:
        """Return the largest eigenvalue, or an upper bound."""
        return self.transposed.largest()

    def shifted(self, shift: float | Tensor) -> TransposedKronecker:
        """Return ``M + shift I``."""
        return TransposedKronecker(self.transposed.shifted(shift))
