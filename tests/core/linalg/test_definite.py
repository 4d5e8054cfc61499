"""Matrices that are not positive definite are refused with the eigenvalue, where values are known."""

import pytest
import torch
from torch.func import vmap

from lrkfac.linalg import (
    Dense,
    Diagonal,
    Kronecker,
    LowRankPlusDiagonal,
    LowRankPlusIsotropic,
    damped,
    inverse,
    inverse_root,
    logdet,
    root,
    to_dense,
)
from tests.tensors import normal

ONE, GOOD = torch.ones(1).double(), Diagonal(torch.ones(2).double())
UNIT = torch.eye(3).double()[:, :1]
ROWS = normal(3, 6)
WRONG = {
    "Diagonal": (Diagonal(torch.tensor([1.0, 0.0, 2.0]).double()), r"the eigenvalue 0, operator\.diagonal\[1\]"),
    "Dense": (
        Dense(torch.diag(torch.tensor([3.0, -0.5]).double())),
        r"eigenvalue -0\.5 \(the largest is 3\) of operator",
    ),
    "a singular Dense": (Dense(ROWS.mT @ ROWS), r"the eigenvalue .*e-1\d \(the largest is .*\) of operator"),
    "not a number": (Diagonal(torch.tensor([1.0, torch.nan]).double()), r"the eigenvalue nan, operator\.diagonal\[1\]"),
    "isotropic": (LowRankPlusIsotropic(UNIT, ONE, torch.tensor(-2.0).double()), r"the eigenvalue -2, operator\.rest"),
    "isotropic's values": (LowRankPlusIsotropic(UNIT, -ONE, ONE[0]), r"the eigenvalue -1, operator\.values\[0\]"),
    "the diagonal of low rank": (
        LowRankPlusDiagonal(UNIT, ONE, torch.tensor([1.0, 2.0, 0.0]).double()),
        r"the entry 0, operator\.diagonal\[2\]",
    ),
    "low rank": (
        LowRankPlusDiagonal(UNIT, -2 * ONE, torch.ones(3).double()),
        r"the eigenvalue -1 .* of operator relative to its diagonal",
    ),
    "a factor": (Kronecker(GOOD, Diagonal(-GOOD.diagonal)), r"the eigenvalue -1, operator\.input\.diagonal\[0\]"),
    "in both bases": (
        damped(Kronecker(Dense(torch.zeros(2, 2).double()), Dense(torch.eye(2).double())), 0.0),
        r"the eigenvalue 0, operator\.kept\[0, 0\]",
    ),
    "in eigenspaces": (damped(Kronecker(GOOD, Diagonal(0 * ONE)), 0.0), r"operator\.output\.diagonal\[0, 0\]"),
}


@pytest.mark.parametrize("function", [root, inverse_root, logdet])
@pytest.mark.parametrize(("operator", "words"), WRONG.values(), ids=WRONG)
def test_refused(operator, words, function):
    with pytest.raises(ValueError, match=f"expected a positive definite matrix, got .*{words}.*; add a multiple"):
        function(operator)


def test_where_values_are_not_known_it_is_not_a_number():
    matrices = torch.stack([torch.eye(2), -torch.eye(2)]).double()
    found = vmap(lambda m: logdet(Dense(m)))(matrices)
    assert found[0] == 0 and found[1].isnan()
    assert vmap(lambda m: logdet(Diagonal(m[0])))(matrices)[1].isnan()


def test_numbers_without_a_meaning_are_not_looked_at():
    """That of directions beside complete vectors."""
    operator = LowRankPlusIsotropic(torch.eye(2).double(), torch.ones(2).double(), torch.tensor(-1.0).double())
    assert logdet(operator) == 0


def test_inverses_are_refused_too():
    for matrix in (Dense(-torch.eye(2)), LowRankPlusDiagonal(torch.eye(2)[:, :1], torch.tensor([-2.0]), torch.ones(2))):
        with pytest.raises(ValueError, match="the eigenvalue -1"):
            inverse(matrix)


def test_a_matrix_that_does_not_fit_into_memory():
    """The bytes are said before they are taken."""
    d = 10_000_000
    with pytest.raises(ValueError, match=r"matrix of 10000000 rows takes 800,000,000,000,000 bytes, .* by its matvec"):
        to_dense(Diagonal(torch.ones((), dtype=torch.float64).expand(d)))
