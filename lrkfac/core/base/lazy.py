"""A matrix that is kept as factors and terms until its entries are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrkfac.core.base.eager import changes_in_place


@dataclass(frozen=True, eq=False)
class LazyMatrix:
    """The matrix ``leftᵀ right + Σ cᵢ Xᵢ``, whose entries are computed only when they are needed.

    A linear layer's gradient ``Σ_n g_n a_nᵀ`` is one, with the rows ``g`` and ``a`` as factors, and so is a multiple of
    it or its sum with other matrices. ``optree`` sees a leaf. Transformations scale the rows and coefficients;
    ``lrkfac.materialize(tree)``, or the end of a chain, computes the sum, in the one product that the gradient needs
    anyway and one pass over memory for each further term.

    Examples:
        >>> import torch
        >>> g, a = torch.ones(5, 2), torch.ones(5, 3)
        >>> gradient = LazyMatrix(g, a, torch.float32)
        >>> gradient.shape
        torch.Size([2, 3])
        >>> gradient.scaled(0.2).plus(torch.ones(2, 3)).dense()
        tensor([[2., 2., 2.],
                [2., 2., 2.]])

    Attributes:
        left: ``[n, rows]``; ``n`` may be 0.
        right: ``[n, columns]``.
        dtype: The dtype of the matrix; the factors may have a wider one.
        terms: Pairs ``(c, X)`` with ``X`` ``[rows, columns]``.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype
    terms: tuple[tuple[float | Tensor, Tensor], ...] = ()

    @staticmethod
    def of(x: Tensor) -> LazyMatrix:
        """Return ``x`` as a lazy matrix with one term."""
        return LazyMatrix(x.new_empty(0, x.shape[0]), x.new_empty(0, x.shape[1]), x.dtype, ((1.0, x),))

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix, ``[rows, columns]``."""
        return torch.Size((self.left.shape[1], self.right.shape[1]))

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.left.device

    @property
    def ndim(self) -> int:
        """The number of axes, 2."""
        return 2

    def t(self) -> LazyMatrix:
        """Return the transpose."""
        return LazyMatrix(self.right, self.left, self.dtype, tuple([(c, x.t()) for c, x in self.terms]))

    def to(self, dtype: torch.dtype) -> LazyMatrix:
        """Return the matrix in another dtype."""
        return replace(self, dtype=dtype)

    def scaled(self, scale: float | Tensor) -> LazyMatrix:
        """Return ``scale`` times the matrix."""
        left = (scale * self.left).to(self.left.dtype) if self.left.shape[0] else self.left
        return LazyMatrix(left, self.right, self.dtype, tuple([(scale * c, x) for c, x in self.terms]))

    def plus(self, x: Tensor, scale: float | Tensor = 1.0) -> LazyMatrix:
        """Return the matrix plus ``scale * x``."""
        return replace(self, terms=((scale, x), *self.terms))

    def unrounded(self) -> Tensor:
        """Return the entries in the widest dtype of factors and terms."""
        terms = list(self.terms)
        if self.left.shape[0] or not terms:
            total, fresh = self.left.mT @ self.right, True
        else:  # on top of a term that must be multiplied first, since its coefficient is a tensor
            index = next((i for i, (c, _) in enumerate(terms) if isinstance(c, Tensor)), 0)
            scale, total = terms.pop(index)
            fresh = isinstance(scale, Tensor) or scale != 1.0
            total = scale * total if fresh else total
        for scale, x in terms:
            total, fresh = add_multiple(total, scale, x, fresh), True
        return total

    def dense(self) -> Tensor:
        """Return the entries in the dtype of the matrix, in memory of their own."""
        entries = self.unrounded()
        return (entries.clone() if any(entries is x for _, x in self.terms) else entries).to(self.dtype)

    def vdot(self, other: LazyMatrix | Tensor) -> Tensor:
        """Return the sum of products of the entries, ``[]``; for two gradients by inner products of their rows."""
        if self.terms:
            one, two = self.unrounded(), _unrounded(other)
            return torch.dot(one.reshape(-1), two.reshape(-1)) if one.dtype == two.dtype else (one * two).sum()
        if isinstance(other, LazyMatrix) and not other.terms:
            return ((self.left @ other.left.mT) * (self.right @ other.right.mT)).sum()
        return ((self.left @ _unrounded(other)) * self.right).sum()


def add_multiple(total: Tensor, scale: float | Tensor, x: Tensor, fresh: bool = False) -> Tensor:
    """Return ``total + scale x``, in the memory of ``total`` if that is ``fresh``: nothing else refers to it.

    Not by ``addmm`` of the product onto ``x``, which copies ``x`` first, and which the compiler does not join with the
    sums that follow.
    """
    in_place = fresh and x.dtype == total.dtype and changes_in_place()
    if isinstance(scale, Tensor):
        return total.addcmul_(x, scale) if in_place and scale.dtype == x.dtype else total + scale * x
    return total.add_(x, alpha=scale) if in_place else torch.add(total, x, alpha=scale)


def _unrounded(x: LazyMatrix | Tensor) -> Tensor:
    return x.unrounded() if isinstance(x, LazyMatrix) else x
