"""Dense and diagonal factors, and the running average that all structures share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.curvature.factors import kept_weight
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal
from lrkfac.testing import check_structure, dtypes, seeds
from tests import reference


@pytest.mark.parametrize("structure", [dense(), diagonal()])
@given(dimension=st.integers(1, 12), dtype=dtypes, seed=seeds)
def test_laws(structure, dimension, dtype, seed):
    check_structure(structure, dimension, dtype=dtype, seed=seed)


@given(st.integers(1, 8), st.integers(1, 6), st.floats(0, 0.99), seeds)
def test_average_is_the_bias_corrected_one(d, n, decay, seed):
    rows = torch.randn(4, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batches = [RowCovariance(x, torch.tensor(0.3, dtype=torch.float64)) for x in rows]
    expected = reference.running_averages([batch.dense() for batch in batches], decay)
    whole, only_diagonal = dense().init(d, rows), diagonal().init(d, rows)
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
