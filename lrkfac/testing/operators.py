"""The laws of the functions of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.linalg.damping import damped, inverse
from lrkfac.core.linalg.determinants import logdet
from lrkfac.core.linalg.entries import diagonal, quadratic_form, scale, trace
from lrkfac.core.linalg.operator_checks import is_custom
from lrkfac.core.linalg.operators import Kronecker, LowRankPlusDiagonal, Operator
from lrkfac.core.linalg.square_roots import inverse_root, root, sample, solve
from lrkfac.testing.laws import check_close, check_law, condition, float64
from lrkfac.testing.strategies import gradients


def check_operator(operator: Operator, damping: float = 0.1) -> None:
    """Check the laws of the functions of ``lrkfac.linalg`` at an operator, against its dense matrix in float64.

    ``matvec``, ``trace``, ``diagonal``, ``quadratic_form``, ``scale`` and ``damped`` are those of the matrix.
    ``root`` and ``inverse_root`` times their transposed are the matrix and its inverse, ``sample`` and ``solve`` what
    follows from them, ``logdet`` the logarithm of the determinant. They hold for the inverse, too, and under ``vmap``
    over two operators. Tolerances of what is inverted grow with the condition number.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal
        >>> check_operator(Diagonal(torch.tensor([1.0, 2.0])))

    Args:
        operator: A positive definite operator, one (no stack). A custom one is checked in ``to_dense``, ``matvec``, and
            the functions for which it has methods.
        damping: Added by ``damped``, positive.

    Raises:
        AssertionError: Says which law is broken, and by how much.
    """
    before = optree.tree_map(torch.clone, operator)
    case = _Case(operator, damping)
    for law in (_products, _multiples, _roots, _inverses, _determinants, _mapped):
        law(case)
    same = [torch.equal(x, y) for x, y in zip(optree.tree_leaves(before), optree.tree_leaves(operator), strict=True)]
    check_law(all(same), "the functions leave the operator unchanged")


class _Case:
    """An operator with its matrix, vectors to apply it to, and tolerances."""

    def __init__(self, operator: Operator, damping: float) -> None:
        leaf = optree.tree_leaves(operator)[0]
        self.operator, self.damping = operator, damping
        self.matrix = float64(operator).to_dense()
        d, eps = self.matrix.shape[0], torch.finfo(leaf.dtype).eps
        self.eigenvalues = torch.linalg.eigvalsh((self.matrix + self.matrix.mT) / 2)
        check_law(self.eigenvalues[0] > 0, f"positive definite: the smallest eigenvalue is {self.eigenvalues[0]:.2e}")
        self.tolerance = (50 + d) * eps
        self.loose = self.tolerance + 20 * eps * condition(float64(operator))
        self.x = gradients(leaf.new_empty(d, 2))

    def has(self, name: str) -> bool:
        """Return whether the operator takes part in a function."""
        return not is_custom(self.operator) or callable(getattr(self.operator, name, None))


def _products(case: _Case) -> None:
    operator, matrix, x = case.operator, case.matrix, case.x
    check_close(matrix, matrix.mT, case.tolerance, "symmetry")
    check_close(operator.matvec(x), matrix @ float64(x), case.tolerance, "matvec = to_dense @ x")
    check_close(operator.matvec(x[:, 0]), operator.matvec(x)[:, 0], case.tolerance, "matvec of a vector = of a column")
    forms = (float64(x) * (matrix @ float64(x))).sum(dim=0)
    check_close(quadratic_form(operator, x), forms, case.loose, "quadratic_form = xᵀ M x")
    if case.has("trace"):
        check_close(trace(operator), matrix.trace(), case.tolerance, "trace")
    if case.has("diagonal"):
        check_close(diagonal(operator), matrix.diagonal(), case.tolerance, "diagonal")


def _multiples(case: _Case) -> None:
    operator, matrix = case.operator, case.matrix
    if case.has("scale"):
        scaled = scale(operator, 2.5)
        check_law(type(scaled) is type(operator), f"scale keeps the class, got {type(scaled).__name__}")
        check_close(float64(scaled).to_dense(), 2.5 * matrix, case.tolerance, "scale")
    if case.has("damped") or case.has("shifted"):
        exact = not isinstance(operator, Kronecker) or not all(isinstance(x, LowRankPlusDiagonal) for x in operator)
        if exact:
            shifted = matrix + case.damping * torch.eye(len(matrix), dtype=matrix.dtype)
            close = float64(damped(operator, case.damping)).to_dense()
            # A factor's eigenvectors are right to the precision of its largest eigenvalue.
            check_close(close, shifted, 4 * case.tolerance, "damped = M + damping I")


def _roots(case: _Case) -> None:
    if case.has("root"):
        half = _checked_root(root(case.operator), case, "root")
        check_close(half @ half.mT, case.matrix, case.tolerance, "root: S Sᵀ = M")
        check_close(sample(case.operator, case.x), half @ float64(case.x), case.tolerance, "sample = S noise")
    if case.has("inverse_root"):
        half = _checked_root(inverse_root(case.operator), case, "inverse_root")
        check_close(half @ half.mT, torch.linalg.inv(case.matrix), case.loose, "inverse_root: S Sᵀ = M⁻¹")
        found = float64(solve(case.operator, case.x)) - torch.linalg.solve(case.matrix, float64(case.x))
        bound = case.loose * float64(case.x).norm() / case.eigenvalues[0]
        check_law(found.norm() <= bound, f"solve = M⁻¹ b: error {found.norm():.2e}, allowed {bound:.2e}")


def _checked_root(half: Any, case: _Case, name: str) -> Tensor:
    """Return the matrix of a root whose methods agree."""
    matrix = float64(half).to_dense()
    check_law(half.shape == tuple(matrix.shape), f"{name}: the shape is {half.shape}, of the matrix {matrix.shape}")
    x, y = case.x.new_ones(half.shape[1]), case.x[:, 0]
    # The root of a product of large condition is applied to one side after the other.
    check_close(half.matvec(x), matrix @ float64(x), case.loose, f"{name}: matvec = to_dense @ x")
    check_close(half.rmatvec(y), matrix.mT @ float64(y), case.loose, f"{name}: rmatvec = to_dense transposed @ y")
    return matrix


def _inverses(case: _Case) -> None:
    if not case.has("inverse"):
        return
    inverted, matrix = inverse(case.operator), torch.linalg.inv(case.matrix)
    check_close(float64(inverted).to_dense(), matrix, case.loose, "inverse = dense inverse")
    half = float64(root(inverted)).to_dense()
    check_close(half @ half.mT, matrix, case.loose, "root of the inverse")
    if case.has("logdet"):
        sizes = case.eigenvalues.log().abs().sum() + len(matrix)
        check_law((logdet(inverted) + logdet(case.operator)).abs() <= case.loose * sizes, "logdet of the inverse")


def _determinants(case: _Case) -> None:
    if not case.has("logdet"):
        return
    expected = case.eigenvalues.log().sum()
    found = float64(logdet(case.operator)) - expected
    # An eigenvalue is right to the precision of the largest one.
    bound = case.tolerance * case.eigenvalues.log().abs().sum() + case.loose * len(case.matrix)
    check_law(found.abs() <= bound, f"logdet: error {found:.2e}, allowed {bound:.2e}")


def _mapped(case: _Case) -> None:
    if is_custom(case.operator):
        return
    pair = case.operator, scale(case.operator, 2.0)
    stacked = optree.tree_map(lambda *x: torch.stack(x), *pair)
    functions: dict[str, Callable[..., Tensor]] = {
        "trace": trace,
        "diagonal": diagonal,
        "logdet": logdet,
        "root": lambda op: root(op).matvec(case.x),
        "inverse_root": lambda op: inverse_root(op).rmatvec(case.x),
        "solve": lambda op: solve(op, case.x),
        "inverse": lambda op: inverse(op).matvec(case.x),
    }
    for name, function in functions.items():
        for mapped, one in zip(vmap(function)(stacked), pair, strict=True):
            check_close(mapped, function(one), case.loose, f"{name} under vmap = one by one")
