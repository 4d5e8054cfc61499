"""What averages and inverses tell, against the dense matrices."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.curvature.diagnosis import needed_rank
from lrkfac.core.curvature.spectra import damped, squared_distance
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, low_rank, low_rank_plus_diagonal
from lrkfac.testing import covariances

weights, shares = st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.05, 0.99)
structures = st.one_of(
    st.sampled_from([dense(), diagonal(), low_rank(2, residual="none")]),
    st.builds(lambda r, w: low_rank(r, weight=w), st.integers(1, 4), weights),
    st.builds(lambda r, w: low_rank_plus_diagonal(r, weight=w), st.integers(1, 4), weights),
)


def averaged(structure, *batches):
    """The state after some batches, as many columns of each as the first has."""
    d = batches[0].rows.shape[1]
    structure = structure if not hasattr(structure, "rank") else replace(structure, rank=min(structure.rank, d))
    state = structure.init(d, batches[0].rows)
    for batch in batches:
        rows = torch.cat([batch.rows, batch.rows.new_zeros(len(batch.rows), d)], dim=1)[:, :d]
        state = structure.update(state, replace(batch, rows=rows), 0.7)
    return structure, state


def average(structure, state):
    """The running average, which a weight does not change."""
    return to_dense((replace(structure, weight=1.0) if hasattr(structure, "weight") else structure).operator(state))


@given(structures, covariances(8, torch.float64), covariances(8, torch.float64), st.floats(1e-3, 1e2), shares)
def test_numbers_of_a_factor(structure, first, second, share, part):
    """Those of the dense average and of the dense inverse; the rank needed is the least that holds a part."""
    structure, state = averaged(structure, first, second)
    M = average(structure, state)
    damping = share * (M.trace() / len(M)).clamp(min=1e-3)
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


@given(structures, covariances(8, torch.float64), covariances(8, torch.float64))
def test_distance_of_two_averages(structure, first, second):
    structure, one = averaged(structure, first)
    _, two = averaged(structure, first, second)
    found, size = squared_distance(one, two)
    M, N = average(structure, one), average(structure, two)
    tolerance = 1e-9 * float(M.square().sum() + N.square().sum())
    torch.testing.assert_close(found, (M - N).square().sum(), rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(size, M.square().sum(), rtol=1e-9, atol=1e-20)
    assert squared_distance(one, one)[0] <= tolerance
