"""The public checkers: they pass what is right (everywhere else in the tests) and name what is broken."""

import dataclasses
import importlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac.testing
from lrkfac import GradientTransformation, scale
from lrkfac.core.curvature.factors import DenseStructure
from lrkfac.core.curvature.low_rank import LowRankStructure
from lrkfac.linalg import Dense, LowRankPlusDiagonal
from lrkfac.testing import (
    check_inverse,
    check_structure,
    check_transformation,
    covariances,
    gradients,
    layers,
    low_rank_plus_diagonals,
)

BECAME = "class: LowRankPlusDiagonal became Dense"
PARAMS = {"w": torch.ones(3, 2, dtype=torch.float64), "b": [torch.zeros(2, dtype=torch.float64)]}


def test_a_wrong_inverse_is_named(monkeypatch):
    operator = LowRankPlusDiagonal(torch.eye(3)[:, :1], torch.ones(1), torch.ones(3))
    check_inverse(operator, 0.1)
    with pytest.raises(AssertionError, match=r"not positive definite: smallest eigenvalue -9.00e-01"):
        check_inverse(Dense(-torch.eye(2)), 0.1)
    broken = operator._replace(values=-operator.values / 3)
    for wrong, law in (broken, r"inverse = dense inverse: error .*, allowed"), (Dense(torch.eye(3)), BECAME):
        monkeypatch.setattr("lrkfac.testing.laws.inverse", lambda op, damping=0.0, wrong=wrong: wrong)
        with pytest.raises(AssertionError, match=f"law broken: {law}"):
            check_inverse(operator, 0.1)


def structure(base, *arguments, **methods):
    return type("Broken", (base,), methods)(*arguments)


def in_place(self, state, covariance, decay):
    return state._replace(matrix=state.matrix.add_(covariance.dense()), steps=state.steps + 1)


DENSE, LOW = DenseStructure, LowRankStructure
BROKEN = {
    "update leaves its arguments unchanged": structure(DENSE, update=in_place),
    "the average is positive semi-definite": structure(LOW, 2, operator=lambda *x: LOW.operator(*x).shifted(-1.0)),
    "batches 16 times as large": structure(DENSE, operator=lambda self, state: Dense(state.matrix.square())),
    "inverse = inverse of the average plus damping": structure(
        DENSE, inverse=lambda self, state, damping: DENSE.inverse(self, state, 2 * damping)
    ),
    "update leaves its updates argument unchanged": lambda g, s: ({**g, "w": g["w"].add_(1)}, s),
    "updates have the form of the parameters": lambda g, s: ({"w": g["w"]}, s),
    "update keeps the form of the state": lambda g, s: (g, (*s, torch.zeros(()))),
    "equal calls give equal results": lambda g, s: ({**g, "w": torch.rand_like(g["w"])}, s),
}


@pytest.mark.parametrize(("law", "broken"), BROKEN.items(), ids=BROKEN)
def test_a_broken_structure_or_transformation_is_named(law, broken):
    update = lambda g, s, params=None, **extra: broken(g, s)  # noqa: E731
    with pytest.raises(AssertionError, match=f"law broken: {law}"):
        if callable(broken):
            check_transformation(GradientTransformation(scale(1.0).init, update), PARAMS)
        else:
            check_structure(broken)


@given(st.data())
def test_strategies_keep_their_promises(data):
    covariance = data.draw(covariances(max_dimension=5, dtype=torch.float32))
    assert covariance.rows.shape[1] <= 5 and covariance.rows.dtype == torch.float32
    operator = data.draw(low_rank_plus_diagonals(max_dimension=5, max_condition=1e3))
    assert (operator.diagonal >= 0.99e-3).all() and (operator.values >= 0).all()
    case = data.draw(layers())
    assert case.inputs.shape[0] == case.output_gradients.shape[0]
    assert dataclasses.is_dataclass(case.layer) and case.layer.d_out >= 1


def test_gradients_are_like_the_tree_and_depend_on_the_seed():
    first, second = gradients(PARAMS, 0), gradients(PARAMS, 1)
    assert first["b"][0].shape == (2,) and first["w"].dtype == torch.float64
    assert not torch.equal(first["w"], second["w"])


def test_without_hypothesis_importing_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    message = "^hypothesis: lrkfac.testing needs it, and it is not installed; python -m pip install hypothesis$"
    with pytest.raises(ImportError, match=message) as error:
        importlib.reload(lrkfac.testing)
    assert error.value.__context__ is None
