"""The laws of operators, structures and transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.rows import as_real
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.ekfac import EigenbasisStructure
from lrkfac.core.curvature.protocol import FactorStructure
from lrkfac.core.curvature.structures import ProductStructure
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.core.linalg.damping import inverse
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, TransposedKronecker
from lrkfac.core.linalg.operators import Kronecker, LowRankPlusDiagonal, Operator
from lrkfac.testing.strategies import generator_of, gradients
from lrkfac.transforms.base import GradientTransformation, apply_updates, chain, identity


def check_inverse(operator: Operator, damping: float | Tensor) -> None:
    """Check the laws of ``inverse`` at an operator.

    The inverse has the same class, is symmetric and positive definite, and equals the dense inverse. ``matvec`` and
    ``to_dense`` agree, and inverting twice returns the start. Tolerances grow with the condition number.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Dense
        >>> check_inverse(Dense(torch.eye(3)), damping=0.1)

    Args:
        operator: A positive semi-definite operator, one (no stack).
        damping: Added to its diagonal, positive.

    Raises:
        AssertionError: Says which law is broken, and by how much.
    """
    shifted = operator.shifted(damping)
    matrix = float64(shifted).to_dense()
    d, eps = matrix.shape[0], torch.finfo(optree.tree_leaves(operator)[0].dtype).eps
    smallest = torch.linalg.eigvalsh(matrix)[0]
    check_law(smallest > 0, f"operator + damping is not positive definite: smallest eigenvalue {smallest:.2e}")
    result = inverse(operator, damping)
    check_law(type(result) is type(operator), f"class: {type(operator).__name__} became {type(result).__name__}")
    inverted = float64(result).to_dense()
    spread = condition(float64(shifted))
    tolerance = 200 * eps * spread + 100 * d * eps
    check_close(inverted, inverted.mT, 1e-12 if eps < 1e-10 else 1e-5, "symmetry of the inverse")
    least = torch.linalg.eigvalsh((inverted + inverted.mT) / 2)[0]
    check_law(least > 0, f"positive definite: the inverse has the eigenvalue {least:.2e}")
    dense = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    check_close(inverted, dense, tolerance, "inverse = dense inverse")
    x = gradients(optree.tree_leaves(operator)[0].new_empty(d, 2))
    for name, op in {"operator": shifted, "inverse": result}.items():
        check_close(op.matvec(x), float64(op).to_dense() @ float64(x), tolerance, f"matvec = to_dense @ x ({name})")
        check_close(op.matvec(x[:, 0]), op.matvec(x)[:, 0], tolerance, f"matvec of a vector = of a column ({name})")
    if tolerance * spread < 1:
        twice = float64(inverse(result)).to_dense()
        check_close(twice, matrix, tolerance * spread, "inverting twice returns the start")


def check_structure(
    structure: FactorStructure | ProductStructure,
    dimension: int = 12,
    damping: float = 1e-2,
    decay: float = 0.9,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Check the laws of a structure over a few batches.

    ``update`` leaves its arguments unchanged and keeps the form of the state. The average is symmetric, positive
    semi-definite and of the scale of the batches. ``inverse`` is positive definite and the inverse of the average plus
    damping. ``vmap`` over two factors equals one after the other. In a structure with rounds, the answers of two parts
    of a batch add up to the update by the whole of it.

    Examples:
        >>> from lrkfac.structures import low_rank
        >>> check_structure(low_rank(2))

    Args:
        structure: The structure of a factor, or of two.
        dimension: The size of the factor.
        damping: The damping of the inverse.
        decay: The decay of the average.
        dtype: The dtype of rows and state.
        seed: The seed of the rows.
        device: The device of rows and state.

    Raises:
        AssertionError: Says which law is broken, and by how much.
    """
    if isinstance(structure, EigenbasisStructure):
        structure = structure.factors
    if isinstance(structure, ProductStructure):
        check_structure(structure.input, dimension, damping, decay, dtype, seed, device)
        check_structure(structure.output, dimension, damping, decay, dtype, seed + 1, device)
        return
    eps, generator = torch.finfo(dtype).eps, generator_of(seed)
    state = scaled = structure.init(dimension, torch.zeros((), dtype=dtype, device=device))
    for step in range(4):
        rows = torch.randn(dimension // 2 + 5 * step + 1, dimension, generator=generator, dtype=torch.float64)
        rows = (rows * torch.logspace(0, -2, dimension, dtype=torch.float64)).to(dtype).to(device)
        before = _copy((state, rows))
        new = _updated(structure, state, rows, decay)
        _same((state, rows), before, "update leaves its arguments unchanged")
        _same_form(new, state, "update keeps the form of the state")
        matrix = float64(structure.operator(new)).to_dense()
        if structure.rounds:
            in_parts = float64(structure.operator(_of_parts(structure, state, rows, decay))).to_dense()
            check_close(in_parts, matrix, 10 * eps**0.5, "answers of parts add up")
        check_close(matrix, matrix.mT, 10 * eps, "the average is symmetric")
        least = torch.linalg.eigvalsh(matrix)[0] / torch.linalg.matrix_norm(matrix)
        check_law(least > -100 * eps, f"the average is positive semi-definite: relative eigenvalue {least:.2e}")
        scaled = _updated(structure, scaled, 4 * rows, decay)
        larger = float64(structure.operator(scaled)).to_dense()
        check_close(larger, 16 * matrix, 10 * eps**0.5, "batches 16 times as large make an average 16 times as large")
        stacked = optree.tree_map(lambda x: torch.stack([x, x]), (state, rows))
        mapped = vmap(lambda s, r: _updated(structure, s, r, decay))(*stacked)
        second = structure.operator(optree.tree_map(lambda x: x[1], mapped))
        # Directions that a batch says nothing about follow its rounding, damped to the root of the precision.
        check_close(float64(second).to_dense(), matrix, 10 * eps**0.5, "update under vmap = update alone")
        damped = matrix + damping * torch.eye(dimension, dtype=torch.float64)
        inverted = float64(structure.inverse(new, damping)).to_dense()
        # Low rank beside a diagonal is subtracted from its inverse, which may be larger than what is left of it.
        tolerance = 500 * eps * condition(float64(structure.operator(new)).shifted(damping))
        check_close(inverted, torch.linalg.inv(damped), tolerance, "inverse = inverse of the average plus damping")
        least = torch.linalg.eigvalsh((inverted + inverted.mT) / 2)[0]
        check_law(least > 0, f"the inverse is positive definite: eigenvalue {least:.2e}")
        state = new


def check_transformation(
    tx: GradientTransformation,
    params: Tree,
    evaluate: Callable[[Tree], tuple[Tree, dict[str, Any]]] | None = None,
    steps: int = 3,
) -> None:
    """Check the laws of a transformation over a few steps.

    ``update`` leaves its arguments unchanged, keeps the form of the state and returns updates like the parameters.
    Equal calls give equal results, in a chain the same as alone, and under ``vmap`` over two models the same as for
    each of them.

    Examples:
        >>> import torch
        >>> from lrkfac import trace
        >>> check_transformation(trace(0.9), {"w": torch.ones(3, 2)})

    Args:
        tx: The transformation.
        params: The parameters to start from.
        evaluate: ``params -> (gradient, extras of update)``, such as ``lambda p: (e.grads, {"evaluation": e})``
            with ``e = evaluate(p, ...)``; by default the gradient of a quadratic and no extras.
        steps: The number of steps.

    Raises:
        AssertionError: Says which law is broken, and by how much.
    """
    eps = max(torch.finfo(leaf.dtype).eps for leaf in optree.tree_leaves(params))
    if evaluate is None:
        fixed = gradients(params)
        evaluate = lambda p: (optree.tree_map(torch.add, fixed, p), {})  # noqa: E731

    def step(tx: GradientTransformation, params: Tree, state: Any) -> tuple[Tree, Any]:
        grads, extra = evaluate(params)
        return tx.update(grads, state, params, **extra)

    chained, chained_state = chain(identity(), tx), chain(identity(), tx).init(params)
    state = tx.init(params)
    stacked_params = optree.tree_map(lambda x: torch.stack([x, x]), params)
    stacked_state = vmap(tx.init)(stacked_params)
    for _ in range(steps):
        before = _copy((params, state))
        grads, extra = evaluate(params)
        copies = _copy(grads)
        updates, new = tx.update(grads, state, params, **extra)
        _same((params, state), before, "update leaves params and state unchanged")
        _same(grads, copies, "update leaves its updates argument unchanged")
        _same_form(updates, params, "updates have the form of the parameters")
        _same_form(new, state, "update keeps the form of the state")
        _same(step(tx, params, state), (updates, new), "equal calls give equal results")
        in_chain, chained_state = step(chained, params, chained_state)
        _same(in_chain, updates, "in a chain the same as alone")
        mapped, stacked_state = vmap(lambda p, s: step(tx, p, s))(stacked_params, stacked_state)
        for one, alone in zip(optree.tree_leaves(mapped), optree.tree_leaves(updates), strict=True):
            check_close(one[1], alone, 1e4 * eps, "under vmap the same as alone")
        params, state = apply_updates(params, updates), new
        stacked_params = apply_updates(stacked_params, mapped)


def _updated(structure: FactorStructure, state: Any, rows: Tensor, decay: float) -> Any:
    scale = torch.full((), 1 / rows.shape[0], dtype=rows.dtype, device=rows.device)
    return structure.update(state, RowCovariance(rows, scale), decay)


def _of_parts(structure: FactorStructure, state: Any, rows: Tensor, decay: float) -> Any:
    """Return the state after a batch of which two processes have parts."""
    scale, half = torch.full((), 1 / rows.shape[0], dtype=rows.dtype, device=rows.device), rows.shape[0] // 2
    parts, carry = [RowCovariance(part, scale) for part in (rows[:half], rows[half:])], structure.begin(state, decay)
    for round in range(structure.rounds):
        answers = [structure.measure(structure.question(carry, round), part, round) for part in parts]
        carry = structure.advance(carry, optree.tree_map(torch.add, *answers), round)
    return carry


def condition(operator: Operator) -> Tensor:
    """Return the condition number of the parts: they may cancel where the whole is well conditioned."""
    if isinstance(operator, Kronecker):
        return condition(operator.output) * condition(operator.input)
    if isinstance(operator, TransposedKronecker):
        return condition(operator.transposed)
    values = torch.linalg.eigvalsh(operator.to_dense())
    if isinstance(operator, EigenspaceKronecker) and isinstance(operator.output, LowRankPlusDiagonal):
        return values[-1] / torch.minimum(operator.output.diagonal.amin(), values[0])
    least = operator.diagonal.amin() if isinstance(operator, LowRankPlusDiagonal) else values[0]
    return values[-1] / torch.minimum(least, values[0])


def float64(tree: Any) -> Any:
    """Return tensors in float64 on the CPU, where the laws are checked: some devices have no float64."""
    return optree.tree_map(lambda x: x.cpu().double(), tree)


def _copy(tree: Tree) -> Tree:
    return optree.tree_map(torch.clone, tree)


def check_law(holds: bool | Tensor, message: str) -> None:
    """Raise ``AssertionError`` unless a law holds."""
    if not holds:
        raise AssertionError(f"law broken: {message}")


def check_close(actual: Tensor, expected: Tensor, tolerance: float | Tensor, law: str) -> None:
    """Raise unless two tensors are close, relative to the norm of the expected one."""
    actual, expected = float64((as_real(actual, -1), as_real(expected, -1)))
    error, bound = (actual - expected).norm(), tolerance * expected.norm()
    check_law(error <= bound, f"{law}: error {error:.2e}, allowed {bound:.2e}")


def _same(actual: Tree, expected: Tree, law: str) -> None:
    for a, b in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        difference = (float64(a) - float64(b)).abs().max() if a.numel() else 0.0
        check_law(torch.equal(a, b), f"{law}: largest difference {difference:.2e}")


def _same_form(actual: Tree, expected: Tree, law: str) -> None:
    structures = optree.tree_structure(actual), optree.tree_structure(expected)
    check_law(structures[0] == structures[1], f"{law}: {structures[0]} instead of {structures[1]}")
    for a, b in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        forms = (tuple(a.shape), a.dtype, a.device), (tuple(b.shape), b.dtype, b.device)
        check_law(forms[0] == forms[1], f"{law}: {forms[0]} instead of {forms[1]}")
