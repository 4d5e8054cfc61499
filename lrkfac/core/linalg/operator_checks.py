"""The package's operators: checks of their entries, and their matrices."""

from __future__ import annotations

from typing import Any

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.memory import memory_of
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.eigenspaces import EigenspaceKronecker, LowRankPlusIsotropic, TransposedKronecker
from lrkfac.core.linalg.operators import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator

OPERATORS = (
    Diagonal,
    Dense,
    LowRankPlusDiagonal,
    LowRankPlusIsotropic,
    Kronecker,
    EigenbasisKronecker,
    EigenspaceKronecker,
    TransposedKronecker,
)
"""The package's operators, which ``inverse`` and ``to_dense`` take."""


def to_dense(operator: Operator) -> Float[Tensor, "d d"]:
    """Return the matrix of an operator, ``[d, d]``: for tests and small problems.

    Args:
        operator: One of ``lrkfac.linalg``.

    Returns:
        The matrix; for ``Dense`` the tensor itself.

    Raises:
        TypeError: If ``operator`` is not one of the package's operators, or its entries are no floating-point tensors.
        ValueError: If their shapes or devices do not fit together, or the matrix does not fit into memory (the bytes
            are said).

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, to_dense
        >>> to_dense(Diagonal(torch.tensor([1.0, 2.0])))
        tensor([[1., 0.],
                [0., 2.]])
    """
    check_operator(operator)
    _check_memory(operator)
    return operator.to_dense()


def _check_memory(operator: Operator) -> None:
    """Raise ``ValueError`` if the matrix takes more than the memory of the device."""
    if torch.compiler.is_compiling():
        return
    like, d = tree_leaves(operator)[0], operator.dimension
    needed, memory = d * d * like.element_size(), memory_of(like.device)
    if memory is not None and needed > memory and not isinstance(operator, Dense):
        raise ValueError(
            f"operator: its matrix of {d} rows takes {needed:,} bytes, more than the {memory:,} of {like.device}; "
            "apply the operator by its matvec"
        )


def check_operator(operator: Any, expected: Any = OPERATORS) -> None:
    """Raise unless ``operator`` is an operator of these classes whose entries fit together.

    Raises:
        TypeError: If it is none, or an entry is no floating-point tensor.
        ValueError: If the shapes of entries do not fit together, or they are on different devices.
    """
    if not isinstance(operator, expected):
        name = "one of lrkfac's operators" if expected is OPERATORS else f"a {expected.__name__}"
        raise TypeError(f"operator: expected {name}, got {type(operator).__name__}")
    if isinstance(operator, Kronecker):
        for factor in operator:
            if not is_custom(factor):
                check_operator(factor)
        return
    if isinstance(operator, TransposedKronecker):
        check_operator(operator.transposed, EigenspaceKronecker)
        return
    if isinstance(operator, EigenspaceKronecker):
        _check_eigenspaces(operator)
        return
    entries: dict[str, Any] = operator._asdict()
    for name, x in entries.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"operator: expected floating-point tensors, got {got} as {name!r}")
    shapes = {name: tuple(x.shape) for name, x in entries.items()}
    if () in list(shapes.values())[:1] or _shapes(operator) != shapes or len({x.device for x in entries.values()}) > 1:
        raise ValueError(f"operator: expected entries of one {type(operator).__name__}, on one device, got {shapes}")


def is_custom(operator: Any) -> bool:
    """Return whether an object, which is none of the package's operators, can be applied as one."""
    return not isinstance(operator, (*OPERATORS, type)) and callable(getattr(operator, "matvec", None))


def _check_eigenspaces(operator: EigenspaceKronecker) -> None:
    """Raise unless there is one operator for each vector, and one for the rest where these are not complete."""
    check_operator(optree.tree_map(lambda x: x[0], operator.output), (Diagonal, Dense, LowRankPlusDiagonal))
    shape = tuple(operator.input_vectors.shape)
    needed = shape[-1] + (not operator.is_complete) if len(shape) == 2 else None
    stacked = {x.shape[0] for x in operator.output}
    if stacked != {needed}:
        raise ValueError(
            f"operator: expected one output for each of the input vectors {shape}, and one for the rest where they are "
            f"not complete, got {sorted(stacked)}"
        )


def _shapes(operator: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes that the entries of an operator must have, from the first of them."""
    first = tuple(operator[0].shape)
    if isinstance(operator, Diagonal):
        return {"diagonal": first[:1]}
    if isinstance(operator, Dense):
        return {"matrix": first[:1] * 2}
    if len(first) != 2:
        return None
    d, r = first
    if isinstance(operator, LowRankPlusDiagonal):
        return {"vectors": first, "values": (r,), "diagonal": (d,)}
    if isinstance(operator, LowRankPlusIsotropic):
        return {"vectors": first, "values": (r,), "rest": ()}
    (d_in, r_in) = (*operator.input_vectors.shape, 0, 0)[:2]
    vectors = {"output_vectors": first, "input_vectors": (d_in, r_in)}
    return {**vectors, "kept": (r, r_in), "output": (r,), "input": (r_in,), "rest": ()}
