"""What averages and inverses tell, against the dense matrices."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.curvature.diagnosis import needed_rank
from lrkfac.core.curvature.spectra import damped
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, low_rank, low_rank_plus_diagonal
from lrkfac.testing import covariances

weights, shares = st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.05, 0.99)
structures = st.one_of(
    st.sampled_from([dense(), diagonal(), low_rank(2, residual="none")]),
    st.builds(lambda r, w: low_rank(r, weight=w), st.integers(1, 4), weights),
    st.builds(lambda r, w: low_rank_plus_diagonal(r, weight=w), st.integers(1, 4), weights),
)


@given(structures, covariances(8, torch.float64), st.floats(1e-3, 1e2), shares)
def test_numbers_of_a_factor(structure, covariance, share, part):
    """Those of the dense average and of the dense inverse; the rank needed is the least that holds a part.

    A weight does not change the average. Distances of two averages: ``drift`` in ``tests/test_diagnostics.py``.
    """
    d = covariance.rows.shape[1]
    structure = structure if not hasattr(structure, "rank") else replace(structure, rank=min(structure.rank, d))
    state = structure.init(d, covariance.rows)
    for rows in (covariance.rows, covariance.rows.flip(1)):
        state = structure.update(state, replace(covariance, rows=rows), 0.7)
    unweighted = replace(structure, weight=1.0) if hasattr(structure, "weight") else structure
    M = to_dense(unweighted.operator(state))
    damping = share * (M.trace() / d).clamp(min=1e-3)
    inverse = structure.inverse(state, damping)
    known = state.spectrum()
    found = damped(state, inverse, damping, known.eigenvalues)
    assert (known.eigenvalues.diff() <= 0).all()
    torch.testing.assert_close(known.eigenvalues.sum() + known.rest, M.trace(), rtol=1e-9, atol=1e-12)
    rank, needed = int(needed_rank(state, part)), part * M.trace()
    assert rank == len(known.eigenvalues) or known.eigenvalues[:rank].sum() >= needed * (1 - 1e-12)
    assert rank == 1 or known.eigenvalues[: rank - 1].sum() < needed * (1 + 1e-12)
    torch.testing.assert_close(found.effective, (M @ to_dense(inverse)).trace(), rtol=1e-6, atol=1e-9)
    eigenvalues = 1 / torch.linalg.eigvalsh(to_dense(inverse))
    low, high = eigenvalues.amin(), eigenvalues.amax()
    if structure.__class__ is low_rank_plus_diagonal(1).__class__:
        assert found.smallest <= low * (1 + 1e-6)
        assert high * (1 - 1e-6) <= found.largest <= 2 * high * (1 + 1e-6)
    else:
        torch.testing.assert_close((found.smallest, found.largest), (low, high), rtol=1e-6, atol=0)
