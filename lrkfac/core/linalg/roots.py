"""Roots ``S`` of symmetric matrices, ``S Sᵀ = M``, applied without being formed, as NamedTuples of tensors.

Those of ``Diagonal``, ``Dense`` and ``LowRankPlusDiagonal`` may be stacked along leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker, kron
from lrkfac.core.linalg.eigenspaces import LowRankPlusIsotropic
from lrkfac.core.linalg.operators import Diagonal
from lrkfac.core.linalg.products import of_columns


@runtime_checkable
class Root(Protocol):
    """A ``[d, k]`` matrix ``S``: a NamedTuple of tensors with these methods, the package's or a custom one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        ...

    def matvec(self, x: Tensor) -> Tensor:
        """Return ``S x`` for ``x`` of shape ``[k]`` or ``[k, n]``."""
        ...

    def rmatvec(self, x: Tensor) -> Tensor:
        """Return ``Sᵀ x`` for ``x`` of shape ``[d]`` or ``[d, n]``."""
        ...

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[d, k]``."""
        ...


class SymmetricRoot(NamedTuple):
    """A root that is symmetric: an operator with the eigenvectors of the matrix, and the roots of its eigenvalues.

    Attributes:
        operator: The root as an operator.
    """

    operator: Diagonal | LowRankPlusIsotropic | EigenbasisKronecker

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return (self.operator.dimension,) * 2

    def matvec(self, x: Float[Tensor, "*many d n"] | Float[Tensor, " d"]) -> Tensor:
        """Return ``S x``."""
        return _on_columns(lambda columns: of_columns(self.operator, columns), x)

    def rmatvec(self, x: Float[Tensor, "*many d n"] | Float[Tensor, " d"]) -> Tensor:
        """Return ``Sᵀ x``, which is ``S x``."""
        return self.matvec(x)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return self.operator.to_dense()


class DenseRoot(NamedTuple):
    """A root in full.

    Attributes:
        matrix: Its entries, ``[d, d]``.
    """

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return self.matrix.shape[-2], self.matrix.shape[-1]

    def matvec(self, x: Float[Tensor, "*many k n"] | Float[Tensor, " k"]) -> Tensor:
        """Return ``S x``."""
        return self.matrix @ x

    def rmatvec(self, x: Float[Tensor, "*many d n"] | Float[Tensor, " d"]) -> Tensor:
        """Return ``Sᵀ x``."""
        return self.matrix.mT @ x

    def to_dense(self) -> Float[Tensor, "d k"]:
        """Return the matrix."""
        return self.matrix


class LowRankRoot(NamedTuple):
    """``diag(scale) (I + left rightᵀ)``, the root of low rank plus diagonal, and of its inverse.

    Attributes:
        scale: ``[d]``, positive.
        left: ``[d, r]``.
        right: ``[d, r]``.
    """

    scale: Tensor
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return (self.scale.shape[-1],) * 2

    def matvec(self, x: Float[Tensor, "*many d n"] | Float[Tensor, " d"]) -> Tensor:
        """Return ``S x``, in O(d r n)."""
        return _on_columns(lambda z: self.scale[..., None] * (z + self.left @ (self.right.mT @ z)), x)

    def rmatvec(self, x: Float[Tensor, "*many d n"] | Float[Tensor, " d"]) -> Tensor:
        """Return ``Sᵀ x``, in O(d r n)."""

        def transposed(z: Tensor) -> Tensor:
            scaled = self.scale[..., None] * z
            return scaled + self.right @ (self.left.mT @ scaled)

        return _on_columns(transposed, x)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return torch.diag_embed(self.scale) + (self.scale[..., None] * self.left) @ self.right.mT


class KroneckerRoot(NamedTuple):
    """A Kronecker product of roots, ``output ⊗ input``; acts on ``vec(G)``, row-major.

    Attributes:
        output: Root of the output factor.
        input: Root of the input factor.
    """

    output: Root
    input: Root

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        (d_out, k_out), (d_in, k_in) = self.output.shape, self.input.shape
        return d_out * d_in, k_out * k_in

    def matvec(self, x: Float[Tensor, "k *n"]) -> Float[Tensor, "d *n"]:
        """Return ``S x``."""
        return _on_both_sides(self.output.matvec, self.input.matvec, self.output.shape[1], self.input.shape[1], x)

    def rmatvec(self, x: Float[Tensor, "d *n"]) -> Float[Tensor, "k *n"]:
        """Return ``Sᵀ x``."""
        return _on_both_sides(self.output.rmatvec, self.input.rmatvec, self.output.shape[0], self.input.shape[0], x)

    def to_dense(self) -> Float[Tensor, "d k"]:
        """Return the matrix."""
        return kron(self.output.to_dense(), self.input.to_dense())


class EigenspaceRoot(NamedTuple):
    """``Σⱼ outputⱼ ⊗ vⱼ vⱼᵀ + output_r ⊗ (I - V Vᵀ)``, the root of an ``EigenspaceKronecker``.

    Attributes:
        output: Stacked roots of its outputs.
        input_vectors: ``V``, ``[d_in, r]``.
    """

    output: SymmetricRoot | DenseRoot | LowRankRoot
    input_vectors: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return (self.output.shape[0] * self.input_vectors.shape[-2],) * 2

    def matvec(self, x: Float[Tensor, "d *n"]) -> Float[Tensor, "d *n"]:
        """Return ``S x``, in O((r + k) d n)."""
        return self._applied(lambda root, z: root.matvec(z), x)

    def rmatvec(self, x: Float[Tensor, "d *n"]) -> Float[Tensor, "d *n"]:
        """Return ``Sᵀ x``, in O((r + k) d n)."""
        return self._applied(lambda root, z: root.rmatvec(z), x)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        v = self.input_vectors
        return self.matvec(torch.eye(self.shape[0], dtype=v.dtype, device=v.device))

    def _applied(self, apply: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        v, d_out = self.input_vectors, self.output.shape[0]
        d_in, r = v.shape
        # One matrix [d_in, d_out n] of all columns, of which the vectors take their parts at once.
        columns = x.reshape(d_out, d_in, -1).transpose(0, 1)
        flat = columns.reshape(d_in, -1)
        along = v.mT @ flat
        each = optree.tree_map(lambda leaf: leaf[:r], self.output)
        total = v @ apply(each, along.reshape(r, d_out, -1)).reshape(r, -1)
        total = total.reshape(columns.shape).transpose(0, 1)
        if r < d_in:
            beside = (flat - v @ along).reshape(columns.shape).transpose(0, 1).reshape(d_out, -1)
            total = total + apply(optree.tree_map(lambda leaf: leaf[r], self.output), beside).reshape(total.shape)
        return total.reshape(x.shape)


class TransposedRoot(NamedTuple):
    """The root of a ``TransposedKronecker``: acts on ``vec(Gᵀ)`` as another does on ``vec(G)``.

    Attributes:
        transposed: The other, whose output is this one's input.
    """

    transposed: EigenspaceRoot

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return self.transposed.shape

    def matvec(self, x: Float[Tensor, "d *n"]) -> Float[Tensor, "d *n"]:
        """Return ``S x``."""
        return self._turned(self.transposed.matvec, x)

    def rmatvec(self, x: Float[Tensor, "d *n"]) -> Float[Tensor, "d *n"]:
        """Return ``Sᵀ x``."""
        return self._turned(self.transposed.rmatvec, x)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        like = self.transposed.input_vectors
        return self.matvec(torch.eye(self.shape[0], dtype=like.dtype, device=like.device))

    def _turned(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        d_out = self.transposed.input_vectors.shape[0]
        columns = x.reshape(d_out, self.shape[0] // d_out, -1).transpose(0, 1)
        return apply(columns.reshape(self.shape[0], -1)).reshape(columns.shape).transpose(0, 1).reshape(x.shape)


def _on_columns(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a function of columns ``[*, d, n]`` of these, or of one vector ``[d]``."""
    return apply(x[:, None])[..., 0] if x.ndim == 1 else apply(x)


def _on_both_sides(
    output: Callable[[Tensor], Tensor], input: Callable[[Tensor], Tensor], k_out: int, k_in: int, x: Tensor
) -> Tensor:
    columns = x.reshape(k_out, k_in, -1)
    n = columns.shape[-1]
    left = output(columns.reshape(k_out, -1)).reshape(-1, k_in, n)
    both = input(left.transpose(0, 1).reshape(k_in, -1)).reshape(-1, left.shape[0], n)
    return both.transpose(0, 1).reshape(-1, *x.shape[1:])
