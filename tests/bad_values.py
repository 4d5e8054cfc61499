"""What no argument of a kind may be, as hypothesis strategies: drawn instead of a valid value."""

import math
from typing import NamedTuple

import optree
import torch
from hypothesis import strategies as st
from torch import nn

import lrkfac
from lrkfac.linalg import Dense, Diagonal, Kronecker, LowRankPlusDiagonal

NAN, INF, EYE = math.nan, math.inf, torch.eye(2)


class Other(NamedTuple):
    """A state of nobody."""

    value: torch.Tensor


def among(*values):
    return st.sampled_from(values)


NOTHING = (None, 1j, b"x", object(), {}, [], (), {"x": 1}, [1.0], Other(torch.ones(2)), nn.Linear(1, 1), print)
"""What is no number, name or tensor."""


def number(low=-INF, high=INF, includes_low=True, optional=False, tensor=True, schedule=False, trees=False):
    """No finite number, nor tensor of one, in [low, high) or (low, high); where trees are fine, none of such."""
    others = [x for x in NOTHING if not (optional and x is None) and not (schedule and callable(x))]
    if trees:
        others = [x for x in others if x not in ([1.0], {"x": 1})]
        others += [{"x": NAN}, [INF], {"x": None}, ([1j],), {"x": "1"}]
    tensors = [torch.ones(2), torch.ones(1, 1), torch.tensor(1j), torch.tensor(True), torch.ones((), device="meta")]
    kinds = among("1", "", True, False, *tensors, *others)
    outside = [among(NAN, INF, -INF)]
    if low > -INF:
        outside.append(st.floats(max_value=low, exclude_max=includes_low, allow_nan=False))
    if high < INF:
        outside.append(st.floats(min_value=high, allow_nan=False))
    values = st.one_of(outside)
    if tensor:
        return st.one_of(values, values.map(lambda x: torch.tensor(x, dtype=torch.float64)), kinds)
    return st.one_of(values, kinds, st.just(torch.tensor(0.5)))


def integer(low=1, optional=False):
    others = [x for x in NOTHING if not (optional and x is None)]
    kinds = among("1", True, 1.0, 2.5, NAN, INF, torch.tensor(2), torch.ones(2), *others)
    return st.one_of(st.integers(max_value=low - 1), kinds)


def one_of(*names):
    return st.one_of(st.text(max_size=8).filter(lambda x: x not in names), among(1, True, *NOTHING))


DTYPE = among(
    *(1, "float32", torch.Tensor, torch.int64, torch.complex64, torch.bool, torch.bfloat16, torch.float16, *NOTHING)
)
"""Nothing in which factors can be held."""
FLAG = among(0, 1, "yes", "", 1.0, torch.tensor(True), torch.ones(2), *NOTHING)
FUNCTION = among(1, "x", torch.ones(2), True, *[x for x in NOTHING if not callable(x)])
TRANSFORMATION = among(
    1, "adam", torch.ones(2), lrkfac.trace, lrkfac.identity()[:1], tuple(lrkfac.identity()), torch.optim.SGD, *NOTHING
)
LIKELIHOOD = among(1, "categorical", torch.ones(2), lrkfac.categorical, nn.CrossEntropyLoss(), *NOTHING)
EVALUATION = among(1, "x", True, torch.ones(()), torch.ones(2), *NOTHING)
FACTOR = among(1, "dense", torch.ones(2), lrkfac.structures.dense, lrkfac.structures.full, Dense(EYE), *NOTHING)
PATH = among(1.5, 1j, object(), {}, [], None)

VECTOR, COUNTS = torch.ones(2), torch.ones(2).long()
NOT_MATRICES = ("x", None, 1.0, VECTOR, torch.ones(2, 3), torch.ones(2, 2).long(), EYE.to(torch.complex64), EYE.bool())
OPERATORS = [
    *[Dense(x) for x in (*NOT_MATRICES, torch.ones(2, 2, 2), torch.ones(()))],
    *[Diagonal(x) for x in ("x", 1, EYE, COUNTS, torch.ones(()))],
    LowRankPlusDiagonal(EYE, torch.ones(3), VECTOR),
    *[LowRankPlusDiagonal(EYE, VECTOR, x) for x in (torch.ones(3), None)],
    *[LowRankPlusDiagonal(x, VECTOR, VECTOR) for x in (VECTOR, torch.ones(2, 2, device="meta"))],
    LowRankPlusDiagonal(EYE, COUNTS, VECTOR),
    *[Kronecker(x, y) for x, y in ((Dense(EYE), "x"), (None, Dense(EYE)), (EYE, EYE))],
    Kronecker(Dense(torch.ones(2, 3)), Dense(EYE)),
]
OPERATOR = among(1, "x", EYE, VECTOR, lrkfac.structures.dense(), Dense, *OPERATORS, *NOTHING)
LOW_RANK = among(Dense(EYE), Diagonal(VECTOR), *OPERATORS, *NOTHING)


def other_leaf(x):
    """Leaves that cannot stand in the place of one of a floating-point tree."""
    wrong = [None, 1.0, "x", 1j, object(), x.long(), x.to(torch.complex64), x.bool(), x.to("meta"), x[..., None]]
    return among(*wrong, *([x.flatten()[:-1]] if x.numel() > 1 else [torch.ones(2)]))


@st.composite
def tree(draw, valid, shapes=True, optional=False):
    """A tree that differs from a dictionary of tensors in structure or in one leaf.

    Without ``shapes``, it is none of floating-point tensors: any tree of these would do.
    """
    whole = [1, "x", 1j, True, object(), [None, 1.0], {"x": "y"}, *([] if optional else [None])]
    if shapes:
        first, *_ = valid
        rest = {k: x for k, x in valid.items() if k != first}
        whole += [{}, [], (), torch.ones(2), rest, {**valid, "more": valid[first]}, {"net": valid}, [*valid.values()]]
        whole += [{**rest, "other": valid[first]}, optree.tree_map(lambda x: x[None], valid)]
    if draw(st.booleans()):
        return draw(among(*whole))
    name = draw(among(*valid))
    leaf = draw(other_leaf(valid[name]))
    if not shapes and (leaf is None or (isinstance(leaf, torch.Tensor) and leaf.is_floating_point())):
        leaf = "x"
    return {**valid, name: leaf}
