"""Kronecker structures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.curvature.factors import DenseStructure
from lrkfac.core.curvature.low_rank import LowRankStructure
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_structure, covariances
from tests import reference

FACTORS = [dense(), diagonal(), low_rank(3), low_rank_plus_diagonal(3)]


@pytest.mark.parametrize("input", FACTORS)
@pytest.mark.parametrize("output", FACTORS)
def test_any_factor_structure_on_either_side(input, output):
    structure = kronecker(input, output)
    check_structure(structure)
    a, b = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    state = structure.init(7, 6, a)
    state = structure.update(state, RowCovariance(b, one), RowCovariance(a, one), 0.9)
    operator = structure.operator(state)
    product = to_dense(structure.inverse(state, 0.3)) @ to_dense(operator.shifted(0.3))
    torch.testing.assert_close(product, torch.eye(42, dtype=torch.float64), rtol=0, atol=1e-9)


@given(covariances(6, torch.float64), covariances(6, torch.float64), st.floats(1e-3, 10))
def test_dense_factors_precondition_as_in_the_reference(a, b, damping):
    structure = kronecker(dense(), dense())
    state = structure.init(a.rows.shape[1], b.rows.shape[1], a.rows)
    state = structure.update(state, b, a, 0.9)
    if a.trace() == 0 or b.trace() == 0:
        return
    gradient = torch.randn(b.rows.shape[1], a.rows.shape[1], dtype=torch.float64)
    found = structure.inverse(state, damping).two_sided(gradient)
    expected = reference.kronecker_preconditioned(gradient[None], a.dense()[None], b.dense()[None], damping)[0]
    assert (found - expected).norm() <= 1e-7 * expected.norm()


def test_each_factor_prefers_its_own_form():
    fitted = kronecker(low_rank(8), low_rank_plus_diagonal(8)).fitted(100, 10)
    assert isinstance(fitted.input, LowRankStructure) and isinstance(fitted.output, DenseStructure)


@pytest.mark.parametrize("other", [None, 3, dense, kronecker(dense(), dense())])
def test_other_objects_are_refused(other):
    with pytest.raises(TypeError, match="input: expected a factor structure"):
        kronecker(other, dense())
    with pytest.raises(TypeError, match="output: expected a factor structure"):
        kronecker(dense(), other)
