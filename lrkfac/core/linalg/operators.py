"""Symmetric matrices that are applied without being formed, as NamedTuples of tensors.

Each class is a pytree for ``optree`` and ``torch.func`` alike, with the methods of ``Operator``. Several
``Diagonal``, ``Dense`` or ``LowRankPlusDiagonal`` may be stacked along leading axes: ``of_rows``, ``trace`` and
``shifted`` then take one argument for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.eigenbasis import kron


@runtime_checkable
class Operator(Protocol):
    """A symmetric ``[d, d]`` matrix: a NamedTuple of tensors with these methods, the package's or a custom one."""

    @property
    def dimension(self) -> int:
        """Number of rows ``d``."""
        ...

    def matvec(self, x: Tensor) -> Tensor:
        """Return ``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        ...

    def of_rows(self, x: Tensor) -> Tensor:
        """Return ``x M`` for ``x`` of shape ``[n, d]``."""
        ...

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[d, d]``."""
        ...

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues, ``[]``."""
        ...

    def shifted(self, shift: float | Tensor) -> Any:
        """Return ``M + shift I``."""
        ...


@runtime_checkable
class TreeOperator(Protocol):
    """A symmetric matrix on trees of tensors, which takes part in the functions of operators by its methods."""

    @property
    def dimension(self) -> int:
        """Number of rows."""
        ...

    def product(self, tree: Tree) -> Tree:
        """Return ``M tree``."""
        ...

    def matvec(self, tree: Tree) -> Tree:
        """Return the same: a tree is the vector."""
        ...


class Diagonal(NamedTuple):
    """A diagonal matrix.

    Attributes:
        diagonal: Its entries, ``[d]``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal
        >>> Diagonal(torch.tensor([1.0, 2.0])).matvec(torch.ones(2))
        tensor([1., 2.])
    """

    diagonal: Tensor

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.diagonal.shape[-1]

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        return _times_rows(self.diagonal, x)

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``."""
        return x * self.diagonal[..., None, :]

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return torch.diag_embed(self.diagonal)

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the sum of the eigenvalues."""
        return self.diagonal.sum(dim=-1)

    def shifted(self, shift: float | Tensor) -> Diagonal:
        """Return ``M + shift I``."""
        return Diagonal(self.diagonal + _over(shift, 1))


class Dense(NamedTuple):
    """A symmetric matrix in full.

    Attributes:
        matrix: Its entries, ``[d, d]``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Dense
        >>> Dense(torch.eye(2)).trace()
        tensor(2.)
    """

    matrix: Tensor

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.matrix.shape[-1]

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``."""
        return self.matrix @ x

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``."""
        return x @ self.matrix

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return self.matrix

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the sum of the eigenvalues."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)

    def shifted(self, shift: float | Tensor) -> Dense:
        """Return ``M + shift I``."""
        identity = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return Dense(self.matrix + _over(shift, 2) * identity)


class LowRankPlusDiagonal(NamedTuple):
    """A low-rank matrix plus a diagonal one, ``V diag(values) Vᵀ + diag(diagonal)``; closed under inversion.

    Attributes:
        vectors: ``V``, ``[d, r]``; need not be orthonormal.
        values: ``[r]``; may be negative.
        diagonal: ``[d]``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import LowRankPlusDiagonal
        >>> M = LowRankPlusDiagonal(torch.ones(3, 1), torch.tensor([2.0]), torch.ones(3))
        >>> M.matvec(torch.ones(3))
        tensor([7., 7., 7.])
    """

    vectors: Tensor
    values: Tensor
    diagonal: Tensor

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.diagonal.shape[-1]

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``M x`` for ``x`` of shape ``[d]`` or ``[d, k]``, in O(d r k)."""
        inner = _times_rows(self.values, self.vectors.mT @ x)
        if x.ndim == 1:
            return self.diagonal * x + self.vectors @ inner
        return torch.addcmul(self.vectors @ inner, self.diagonal[:, None], x)

    def of_rows(self, x: Float[Tensor, "*many n d"]) -> Float[Tensor, "*many n d"]:
        """Return ``x M``: the matrix applied to each row of ``x``, in O(n d r)."""
        inner = (x @ self.vectors) * self.values[..., None, :]
        return torch.addcmul(inner @ self.vectors.mT, x, self.diagonal[..., None, :])

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return (self.vectors * self.values[..., None, :]) @ self.vectors.mT + torch.diag_embed(self.diagonal)

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the sum of the eigenvalues."""
        return self.diagonal.sum(dim=-1) + (self.values * self.vectors.square().sum(dim=-2)).sum(dim=-1)

    def shifted(self, shift: float | Tensor) -> LowRankPlusDiagonal:
        """Return ``M + shift I``."""
        return self._replace(diagonal=self.diagonal + _over(shift, 1))

    def inner(self, other: LowRankPlusDiagonal) -> Float[Tensor, "*many"]:
        """Return the Frobenius inner product ``tr(M N)``, without forming either."""
        (u, s, d), (v, t, e) = self, other
        products = (u.mT @ v).square()
        pairs = (s * (products @ t[..., None])[..., 0]).sum(dim=-1) + (d * e).sum(dim=-1)
        at_two = ((u.square() @ s[..., None])[..., 0] * e).sum(dim=-1)
        at_one = ((v.square() @ t[..., None])[..., 0] * d).sum(dim=-1)
        return pairs + at_two + at_one


class Kronecker(NamedTuple):
    """A Kronecker product ``output ⊗ input``: acts on ``vec(G)``, row-major, as ``output G input``.

    Attributes:
        output: Operator of dimension ``d_out``.
        input: Operator of dimension ``d_in``.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, Kronecker
        >>> Kronecker(Diagonal(torch.tensor([1.0, 2.0])), Diagonal(torch.ones(3))).to_dense().diagonal()
        tensor([1., 1., 1., 2., 2., 2.])
    """

    output: Operator
    input: Operator

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self.output.dimension * self.input.dimension

    def two_sided(self, gradient: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Return ``output G input`` for a matrix ``G`` of the layer's shape."""
        return self.input.of_rows(self.output.matvec(gradient))

    def of_rows(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ``x (output ⊗ input)``: applied to each row of ``x``."""
        return self.matvec(x.mT).mT

    def matvec(self, x: Float[Tensor, "d *k"]) -> Float[Tensor, "d *k"]:
        """Return ``(output ⊗ input) x`` for ``x`` of shape ``[d_out d_in]`` or ``[d_out d_in, k]``."""
        columns = x.reshape(x.shape[0], -1)
        d_out, d_in = self.output.dimension, self.input.dimension
        left = self.output.matvec(columns.reshape(d_out, -1)).reshape(d_out, d_in, -1)
        both = self.input.matvec(left.transpose(0, 1).reshape(d_in, -1)).reshape(d_in, d_out, -1)
        return both.transpose(0, 1).reshape(x.shape)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """Return the matrix."""
        return kron(self.output.to_dense(), self.input.to_dense())

    def trace(self) -> Float[Tensor, "*many"]:
        """Return the sum of the eigenvalues."""
        return self.output.trace() * self.input.trace()

    def shifted(self, shift: float | Tensor) -> Kronecker:
        """Return ``(output + δ_B I) ⊗ (input + δ_A I)`` with ``δ_A δ_B = shift``: factored Tikhonov damping.

        ``δ_A = π √shift`` and ``δ_B = √shift / π`` with ``π² = mean eigenvalue of the input factor /
        mean eigenvalue of the output factor`` (Martens & Grosse 2015, arXiv 1503.05671, section 6.3).
        It is not ``M + shift I``, which has no Kronecker form.
        """
        input_damping, output_damping = split_damping(self, shift)
        return Kronecker(self.output.shifted(output_damping), self.input.shifted(input_damping))


def mean_eigenvalue(operator: Operator) -> Tensor:
    """Return the mean eigenvalue ``[*]``; of a product by side, as the product of traces may overflow in float32."""
    if isinstance(operator, Kronecker):
        return mean_eigenvalue(operator.output) * mean_eigenvalue(operator.input)
    return operator.trace() / operator.dimension


def split_damping(operator: Kronecker, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(δ_A, δ_B)`` with ``δ_A δ_B = damping``, in proportion to the factors' mean eigenvalues.

    A factor that is zero says nothing about scale: then ``π = 1``. Elsewhere ``π`` is kept within
    1e-8 and 1e8.
    """
    return split_by_means(mean_eigenvalue(operator.input), mean_eigenvalue(operator.output), damping)


def split_by_means(mean_input: Tensor, mean_output: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``split_damping`` does, from the mean eigenvalues of the factors."""
    known = (mean_input > 0) & (mean_output > 0)
    ratio = torch.where(known, mean_input, 1.0) / torch.where(known, mean_output, 1.0)
    pi = ratio.clamp(1e-16, 1e16).sqrt()
    root = damping**0.5
    return root * pi, root / pi


def _over(shift: float | Tensor, axes: int) -> float | Tensor:
    """Return numbers, one for each of several operators, with axes of length 1 behind."""
    return shift[(..., *[None] * axes)] if isinstance(shift, Tensor) else shift


def _times_rows(scale: Tensor, x: Tensor) -> Tensor:
    return scale * x if x.ndim == 1 else scale[:, None] * x
