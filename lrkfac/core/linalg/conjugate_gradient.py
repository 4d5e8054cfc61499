"""Linear systems with a symmetric positive definite matrix that is known only by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_integer, check_number
from lrkfac.core.base.eager import may_be_read
from lrkfac.core.base.flat import unflattened
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.actions import SymmetricMap, action, check_vector, is_vector


class Solution(NamedTuple):
    """The result of ``conjugate_gradient``.

    Attributes:
        solution: ``x``, like ``b``.
        relative_residual: ``‖b - (M + damping I) x‖ / ‖b‖`` by the recursion of the method, ``[]``; 0 where ``b = 0``.
        products: Number of products with ``M``, int64 ``[]``.
    """

    solution: Tree
    relative_residual: Tensor
    products: Tensor


class _State(NamedTuple):
    x: Tensor
    residual: Tensor
    direction: Tensor
    slope: Tensor  # of the residual along the preconditioned residual
    norm: Tensor
    products: Tensor
    done: Tensor


def conjugate_gradient(
    operator: SymmetricMap,
    b: Tree,
    preconditioner: SymmetricMap | None = None,
    damping: float | Tensor = 0.0,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    start: Tree | None = None,
) -> Solution:
    """Return the solution of ``(M + damping I) x = b`` by preconditioned conjugate gradients.

    The method of Hestenes & Stiefel (1952), preconditioned as in Saad, Iterative Methods for Sparse Linear Systems
    (2003), algorithm 9.1. Each iteration takes one product with ``M`` and one with the preconditioner, an approximate
    inverse of ``M + damping I``. It ends when the relative residual is at most ``tolerance``, or where
    ``M + damping I`` or the preconditioner turns out not to be positive definite. Inside ``torch.func`` and
    ``torch.compile`` it always takes ``max_iterations``, and a converged solution no longer changes.

    Args:
        operator: ``M``, symmetric and positive semidefinite: a function, or an operator with ``matvec`` (where ``b`` is
            a vector) or ``product`` (where ``b`` is a tree).
        b: The right-hand side: a vector ``[d]`` or a tree.
        preconditioner: A function or operator like ``operator``, symmetric and positive definite; by default none.
        damping: Added to all eigenvalues, at least 0.
        tolerance: Largest accepted ``‖b - (M + damping I) x‖ / ‖b‖``.
        max_iterations: Maximum number of products, plus one with ``start``.
        start: Initial guess, like ``b``; by default zero.

    Returns:
        A ``Solution``: ``solution``, ``relative_residual`` and the number of ``products``.

    Raises:
        ValueError: If shapes or dimensions do not fit, or a number is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, conjugate_gradient
        >>> M, b = Diagonal(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
        >>> found = conjugate_gradient(M, b)
        >>> found.solution.round(decimals=4), int(found.products)
        (tensor([1.0000, 0.5000, 0.2500]), 3)
        >>> int(conjugate_gradient(M, b, preconditioner=lambda r: r / M.diagonal).products)
        1
    """
    right = check_vector(b, "b")
    times = action(operator, b)
    precondition = (lambda r: r) if preconditioner is None else action(preconditioner, b, "preconditioner")
    check_number(damping, "damping", 0)
    check_number(tolerance, "tolerance", 0)
    check_integer(max_iterations, "max_iterations")
    if start is not None:
        check_like(b, start, "start")

    def damped(x: Tensor) -> Tensor:
        return times(x) + damping * x

    length = torch.linalg.vector_norm(right)
    x, residual = torch.zeros_like(right), right
    products = torch.zeros((), dtype=torch.int64, device=right.device)
    if start is not None:
        x = check_vector(start, "start").to(right.dtype)
        residual, products = right - damped(x), products + 1
    state = _begun(x, residual, products, precondition, tolerance * length)
    for _ in range(max_iterations):
        if may_be_read(state.done) and bool(state.done):
            break
        state = _step(state, damped, precondition, tolerance * length)
    relative = state.norm / torch.where(length > 0, length, 1)
    solution = state.x if is_vector(b) else unflattened(state.x, b)
    return Solution(solution, relative, state.products)


def _begun(
    x: Tensor, residual: Tensor, products: Tensor, precondition: Callable[[Tensor], Tensor], target: Tensor
) -> _State:
    direction = precondition(residual)
    slope, norm = torch.dot(residual, direction), torch.linalg.vector_norm(residual)
    return _State(x, residual, direction, slope, norm, products, (norm <= target) | ~(slope > 0))


def _step(
    state: _State, damped: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], target: Tensor
) -> _State:
    """Return the next state, or the same where it is done."""
    image = damped(state.direction)
    curvature = torch.dot(state.direction, image)
    definite = curvature > 0
    size = state.slope / torch.where(definite, curvature, 1)
    x, residual = state.x + size * state.direction, state.residual - size * image
    preconditioned = precondition(residual)
    slope, norm = torch.dot(residual, preconditioned), torch.linalg.vector_norm(residual)
    direction = preconditioned + slope / torch.where(state.slope > 0, state.slope, 1) * state.direction
    moves = ~state.done & definite

    def of(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(moves, new, old)

    return _State(
        of(x, state.x),
        of(residual, state.residual),
        of(direction, state.direction),
        of(slope, state.slope),
        of(norm, state.norm),
        state.products + (~state.done).to(torch.int64),
        ~moves | (norm <= target) | ~(slope > 0),
    )
