"""Dense and diagonal factors, and the running average that all structures share; their laws: ``test_low_rank.py``."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal
from lrkfac.testing import seeds
from tests import reference


@given(st.integers(1, 8), st.integers(1, 6), st.floats(0, 0.99), seeds)
def test_average_is_the_bias_corrected_one(d, n, decay, seed):
    rows = torch.randn(4, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batches = [RowCovariance(x, torch.tensor(0.3, dtype=torch.float64)) for x in rows]
    averages = torch.stack(reference.running_averages([batch.dense() for batch in batches], decay))
    for structure, expected in ((dense(), averages), (diagonal(), torch.diag_embed(averages.diagonal(0, 1, 2)))):
        state = structure.init(d, rows)
        for batch, average in zip(batches, expected, strict=True):
            state = structure.update(state, batch, decay)
            torch.testing.assert_close(to_dense(structure.operator(state)), average)
        assert structure.init(d, rows.bfloat16())[0].dtype == torch.float32
