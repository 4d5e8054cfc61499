"""Dense and diagonal factors, the running average that all structures share, and products of any two factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.curvature.factors import kept_weight
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_structure, covariances, dtypes, seeds
from tests import reference


@pytest.mark.parametrize("structure", [dense(), diagonal()])
@given(dimension=st.integers(1, 12), dtype=dtypes, seed=seeds)
def test_laws(structure, dimension, dtype, seed):
    check_structure(structure, dimension, dtype=dtype, seed=seed)


@given(st.data(), st.integers(1, 8), st.floats(0, 0.99))
def test_average_is_the_bias_corrected_one(data, d, decay):
    batches = [data.draw(covariances(8, torch.float64).filter(lambda c: c.rows.shape[1] >= d)) for _ in range(4)]
    batches = [batch.__class__(batch.rows[:, :d], batch.scale) for batch in batches]
    expected = reference.running_averages([batch.dense() for batch in batches], decay)
    whole, only_diagonal = dense().init(d, batches[0].rows), diagonal().init(d, batches[0].rows)
    for batch, average in zip(batches, expected, strict=True):
        whole = dense().update(whole, batch, decay)
        only_diagonal = diagonal().update(only_diagonal, batch, decay)
        torch.testing.assert_close(whole.matrix, average)
        torch.testing.assert_close(to_dense(diagonal().operator(only_diagonal)).diagonal(), average.diagonal())


@given(st.integers(0, 50), st.floats(0, 0.999))
def test_weights_of_the_average_sum_to_one(steps, decay):
    weights = torch.ones(0, dtype=torch.float64)
    for t in range(steps + 1):
        kept = kept_weight(torch.tensor(t), weights, decay)
        weights = torch.cat([weights * kept, (1 - kept)[None]])
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    if decay > 0.1 and steps < 20:
        torch.testing.assert_close(weights[:-1] / weights[1:], torch.full((steps,), decay, dtype=torch.float64))


def test_half_precision_parameters_have_float32_factors():
    for structure in (dense(), diagonal()):
        assert structure.init(3, torch.zeros(1, dtype=torch.bfloat16))[0].dtype == torch.float32


FACTORS = [dense(), diagonal(), low_rank(3), low_rank_plus_diagonal(3)]


@pytest.mark.parametrize("input", FACTORS)
@pytest.mark.parametrize("output", FACTORS)
def test_any_factor_structure_on_either_side(input, output):
    structure = kronecker(input, output)
    a, b = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    state = structure.init(7, 6, a)
    state = structure.update(state, RowCovariance(b, one), RowCovariance(a, one), 0.9)
    operator = structure.operator(state)
    product = to_dense(structure.inverse(state, 0.3)) @ to_dense(operator.shifted(0.3))
    torch.testing.assert_close(product, torch.eye(42, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("other", [None, 3, dense, kronecker(dense(), dense())])
def test_other_objects_are_refused(other):
    with pytest.raises(TypeError, match="input: expected a factor structure"):
        kronecker(other, dense())
    with pytest.raises(TypeError, match="output: expected a factor structure"):
        kronecker(dense(), other)
