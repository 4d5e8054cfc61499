"""Operators as arguments: whether their entries fit together, and the matrix that they stand for."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lrkfac.core.operators import CorrectedKronecker, Dense, Diagonal, Kronecker, LowRankPlusDiagonal, Operator


def to_dense(operator: Operator) -> Float[Tensor, "d d"]:
    """The matrix that an operator stands for, ``[d, d]``: for tests and small problems.

    Raises:
        TypeError: If ``operator`` is not one of the package's operators, or its entries are no floating-point tensors.
        ValueError: If their shapes or devices do not fit together.
    """
    need_operator(operator)
    return operator.to_dense()


def need_operator(given: Any, expected: Any = Operator) -> None:
    """Refuses what is no operator (of these classes), or one whose entries do not fit together.

    Raises:
        TypeError: If it is none, or an entry is no floating-point tensor.
        ValueError: If the shapes of entries do not fit together, or they are on different devices.
    """
    if not isinstance(given, expected):
        name = "one of lrkfac's operators" if expected is Operator else f"a {expected.__name__}"
        raise TypeError(f"operator: expected {name}, got {type(given).__name__}")
    if isinstance(given, Kronecker):
        need_operator(given.output)
        need_operator(given.input)
        return
    entries: dict[str, Any] = given._asdict()
    for name, x in entries.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"operator: expected floating-point tensors, got {got} as {name!r}")
    shapes = {name: tuple(x.shape) for name, x in entries.items()}
    if () in list(shapes.values())[:1] or _shapes(given) != shapes or len({x.device for x in entries.values()}) > 1:
        raise ValueError(f"operator: expected entries of one {type(given).__name__}, on one device, got {shapes}")


def _shapes(operator: Diagonal | Dense | LowRankPlusDiagonal | CorrectedKronecker) -> dict[str, tuple[int, ...]] | None:
    """The shapes that the entries of an operator must have, from the first of them."""
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
    (d_in, r_in) = (*operator.input_vectors.shape, 0, 0)[:2]
    vectors = {"output_vectors": first, "input_vectors": (d_in, r_in)}
    return {**vectors, "kept": (r, r_in), "output": (r,), "input": (r_in,), "rest": ()}
