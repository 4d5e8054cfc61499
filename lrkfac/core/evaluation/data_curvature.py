"""Curvature matrices of a loss over data, as operators on trees like the parameters and on flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.arguments import check_values
from lrkfac.core.base.autograd import recording
from lrkfac.core.base.containers import with_opened_inputs
from lrkfac.core.base.flat import flat_size, flattened, unflattened
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import add_scaled, materialize, scaled
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.objective import Objective

Rule = Callable[[Objective, Tree, Tree, list[Tensor], Tree], tuple[Tree, Tensor]]
"""``rule(objective, params, inputs, targets, tangent)`` returns the product of a batch, and the batch's weight."""
Batches = Iterable[tuple[Tree, Tree]]
"""Pairs ``(inputs, targets)``, which can be iterated over again."""


@dataclass(frozen=True, eq=False, repr=False)
class DataCurvature:
    """A symmetric matrix on the space of parameters, known by its products: the mean of those of some batches.

    ``lrkfac.curvature.ggn``, ``fisher_product`` and ``hessian`` make it. Batches are means over their terms and are
    weighted with the total weight of these, as in ``merge_evaluations``. A flat vector has the leaves of the tree one
    after another, in the order of ``optree.tree_leaves``, each row-major.

    Attributes:
        rule: The product of one batch.
        objective: The model and its likelihood.
        params: Where the curvature is taken.
        batches: Pairs ``(inputs, targets)``; each product goes through all of them.
        chunk: Number of columns that go through the model at once.
    """

    rule: Rule
    objective: Objective
    params: Tree
    batches: Batches
    chunk: int

    @property
    def dimension(self) -> int:
        """Number of rows ``d``: the number of all parameters."""
        return flat_size(self.params)

    def product(self, tangent: Tree) -> Tree:
        """Return the matrix times a tree like the parameters.

        Raises:
            ValueError: If the tree does not fit the parameters, or there is no batch.
            TypeError: If a batch is no pair ``(inputs, targets)``. Errors of the model and the likelihood pass.
        """
        check_like(self.params, tangent, "product: tangent")
        with recording(False):
            return self._mean(materialize(tangent))

    def matvec(self, x: Tensor) -> Tensor:
        """Return the matrix times a flat vector ``[d]``, or several ``[d, k]``, ``chunk`` at once.

        Raises:
            ValueError: If the length is not that of the parameters; as ``product``.
            TypeError: If ``x`` is no floating-point tensor; as ``product``.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"matvec: expected x to be a floating-point tensor [d] or [d, k], got {got}")
        if x.ndim not in (1, 2) or x.shape[0] != self.dimension:
            d = self.dimension
            raise ValueError(f"matvec: expected x of shape [{d}] or [{d}, k], got {tuple(x.shape)}")
        if x.ndim == 1:
            return flattened(self.product(unflattened(x, self.params))).to(x.dtype)
        with recording(False):
            parts = [self._columns(part) for part in x.split(self.chunk, dim=1)]
            return torch.cat(parts, dim=1).to(x.dtype) if parts else x

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[d, d]``, symmetric to rounding: for small models.

        Raises:
            ValueError, TypeError: As ``product``.
        """
        first = optree.tree_leaves(self.params)[0]
        return self.matvec(torch.eye(self.dimension, dtype=flattened(self.params).dtype, device=first.device))

    def as_scipy(self) -> Any:
        """Return the matrix as a ``scipy.sparse.linalg.LinearOperator``, on vectors and matrices of NumPy.

        Raises:
            ImportError: Without SciPy.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("scipy: as_scipy() needs it, and it is not installed") from error
        like = flattened(self.params)

        def product(x: Any) -> Any:
            return self.matvec(torch.as_tensor(x, dtype=like.dtype, device=like.device)).cpu().numpy()

        dtype = torch.zeros((), dtype=like.dtype).numpy().dtype
        options = {"matvec": product, "matmat": product, "rmatvec": product, "rmatmat": product}
        return LinearOperator((self.dimension, self.dimension), dtype=dtype, **options)

    def _columns(self, x: Tensor) -> Tensor:
        """Return the products of some columns, one by one where the model cannot be mapped over them."""

        def one(column: Tensor) -> Tensor:
            return flattened(self._mean(unflattened(column, self.params)))

        if x.shape[1] > 1:
            try:
                return vmap(one, in_dims=1, out_dims=1)(x)
            except (torch.OutOfMemoryError, NotImplementedError):
                raise
            except RuntimeError:  # such as a torch.autograd.Function without a rule for vmap
                if torch.compiler.is_compiling():
                    raise
        return torch.stack([one(column) for column in x.unbind(1)], dim=1)

    def _mean(self, tangent: Tree) -> Tree:
        """Return the weighted mean of the products of all batches."""
        total, weights = None, None
        for inputs, targets in self._pairs():
            model, opened = with_opened_inputs(self.objective.model, inputs)
            objective = Objective(model, self.objective.heads, self.objective.has_aux)
            check_values(inputs=opened, targets=targets)
            leaves = objective.heads.leaves(targets, "targets")
            product, weight = self.rule(objective, self.params, opened, leaves, tangent)
            if total is None or weights is None:
                total, weights = scaled(weight, product), weight
            else:
                total, weights = add_scaled(total, weight, product), weights + weight
        if weights is None:
            raise ValueError("batches: expected at least one pair (inputs, targets), got none")
        return scaled(1 / weights, total)

    def _pairs(self) -> Iterator[tuple[Tree, Tree]]:
        for i, batch in enumerate(self.batches):
            check_pair(batch, i)
            inputs, targets = batch
            yield inputs, targets


def check_batches(batches: Any, passes: int | None = None) -> None:
    """Raise unless batches are pairs ``(inputs, targets)`` that can be iterated over again, or ``passes`` times.

    Raises:
        TypeError: If they cannot be iterated over, or the first of a sequence is no pair.
        ValueError: If they can be iterated over once, or a sequence is empty.
    """
    if isinstance(batches, Tensor | str | bytes | dict) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches: expected an iterable of pairs (inputs, targets), such as a DataLoader or "
            f"[(inputs, targets)] for a single batch, got {type(batches).__name__}"
        )
    if isinstance(batches, Iterator) and passes != 1:
        often = "that starts anew for each product" if passes is None else f"that can be passed {passes} times"
        raise ValueError(
            f"batches: expected an iterable {often}, got {type(batches).__name__}, which runs through once; pass a "
            "list or a DataLoader"
        )
    if isinstance(batches, Sequence):
        if not batches:
            raise ValueError("batches: expected at least one pair (inputs, targets), got none")
        check_pair(batches[0], 0)


def check_pair(batch: Any, number: int) -> None:
    """Raise ``TypeError`` unless a batch is a pair ``(inputs, targets)``."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(
            f"batches: expected pairs (inputs, targets), got {got} as number {number}; a single batch is "
            "[(inputs, targets)]"
        )
