"""Factors and their averages; low-rank ones: exact in what they promise, near the best possible in the rest."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkfac.core.curvature.diagnosis import needed_rank
from lrkfac.core.curvature.factors import DenseStructure
from lrkfac.core.curvature.spectra import damped
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_structure, covariances, dtypes, seeds
from tests import reference
from tests.tensors import normal

STRUCTURES = {
    "low_rank": low_rank,
    "truncated": lambda rank: low_rank(rank, residual="none"),
    "by power iteration": lambda rank: low_rank(rank, method="power", iterations=3),
    "plus diagonal": low_rank_plus_diagonal,
    "plus diagonal by power iteration": lambda rank: low_rank_plus_diagonal(rank, method="power", iterations=2),
    "low rank, weighted": lambda rank: low_rank(rank, weight=2.0),
    "plus diagonal, weighted": lambda rank: low_rank_plus_diagonal(rank, weight=0.5),
    "off-diagonal": lambda rank: low_rank_plus_diagonal(rank, fit="off_diagonal"),
    "dense": lambda rank: dense(),
    "diagonal": lambda rank: diagonal(),
}
EXACT = [make for name, make in STRUCTURES.items() if name != "off-diagonal"]
BOTH = pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal])


def averaged(structure, batches, decay=0.9):
    state = structure.init(batches[0].rows.shape[1], batches[0].rows)
    for batch in batches:
        state = structure.update(state, batch, decay)
    return state, reference.running_averages([batch.dense().double() for batch in batches], decay)[-1]


def mean_of(rows):
    return RowCovariance(rows, torch.tensor(1 / len(rows), dtype=rows.dtype))


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES.keys())
@settings(max_examples=5)
@given(dimension=st.integers(1, 8), rank=st.integers(1, 9), dtype=dtypes, seed=seeds)
def test_laws(make, dimension, rank, dtype, seed):
    check_structure(make(rank), dimension, dtype=dtype, seed=seed)


@pytest.mark.parametrize("make", EXACT)
@settings(max_examples=8)
@given(covariance=covariances(12, torch.float64), decay=st.floats(0, 0.99))
def test_full_rank_is_exact(make, covariance, decay):
    """The bias-corrected average, or its diagonal. Factors of half precision are float32."""
    structure, d = make(covariance.rows.shape[1]), covariance.rows.shape[1]
    batches = [RowCovariance(scale * covariance.rows, covariance.scale) for scale in (1, 2, 0.5)]
    state, expected = averaged(structure, batches, decay)
    expected = torch.diag(expected.diagonal()) if structure == diagonal() else expected
    assert (to_dense(structure.operator(state)) - expected).norm() <= 1e-12 * expected.norm()
    assert structure.init(d, covariance.rows.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal, STRUCTURES["off-diagonal"]])
@given(covariances(16), st.integers(1, 6), st.floats(0, 0.99), st.floats(0, 10))
def test_what_is_left_out_keeps_the_trace_or_diagonal_and_may_be_weighted(make, covariance, rank, decay, weight):
    """A weight multiplies it and nothing else: the average goes on unweighted."""
    batches = [covariance, RowCovariance(covariance.rows.flip(1), covariance.scale)]
    state, average = averaged(make(rank), batches, decay)
    kept, tolerance = to_dense(make(rank).operator(state)).double(), 100 * torch.finfo(covariance.rows.dtype).eps
    assert (kept.trace() - average.trace()).abs() <= tolerance * average.trace()
    if make is not low_rank:
        assert (state.diagonal >= 0).all() and (state.values >= 0).all()
        assert (kept - average).diagonal().abs().max() <= tolerance * average.diagonal().max()
    if make is STRUCTURES["off-diagonal"]:
        return
    weighted = make(rank, weight=weight)
    same, _ = averaged(weighted, batches, decay)
    assert all(torch.equal(x, y) for x, y in zip(state, same, strict=True))
    V, d = state.vectors, len(state.vectors)
    identity = torch.eye(d, dtype=V.dtype)
    rest = state.residual * (identity - V @ V.mT) if make is low_rank else torch.diag(state.diagonal)
    expected = V * state.values @ V.mT + weight * rest
    error = (to_dense(weighted.operator(state)) - expected).norm()
    assert error <= d * tolerance * (1 + weight) * expected.norm()


@pytest.mark.parametrize("rank", [2, 5, 10])
def test_near_the_best(rank):
    """Low rank to the best truncation; plus diagonal to the fit iterated to convergence."""
    basis, scales = torch.linalg.qr(normal(30, 30)).Q, torch.logspace(0, -2, 30, dtype=torch.float64)
    changing = [mean_of(x) for x in normal(15, 20, 30, seed=1) * scales @ basis]
    state, average = averaged(low_rank(rank), changing)
    best = reference.truncated(average, rank, residual="isotropic")
    assert (to_dense(low_rank(rank).operator(state)) - average).norm() <= 1.1 * (best - average).norm()

    noise = normal(400, 30, seed=2) * torch.logspace(-1, 0.5, 30, dtype=torch.float64)
    batch = mean_of(normal(400, rank, seed=3) @ normal(rank, 30, seed=1) + noise)
    state, average = averaged(low_rank_plus_diagonal(rank), [batch] * 160)
    vectors, values, rest = reference.low_rank_plus_diagonal_dense(average, rank)
    error = (to_dense(low_rank_plus_diagonal(rank).operator(state)) - average).norm()
    assert error <= 1.1 * ((vectors * values) @ vectors.mT + torch.diag(rest) - average).norm()
    assert error < (reference.truncated(average, rank, residual="isotropic") - average).norm()


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal, STRUCTURES["by power iteration"]])
def test_a_new_direction_is_found_from_a_warm_basis(make):
    """The new direction is orthogonal to the warm basis: only fresh columns can find it."""
    first, second = torch.zeros(2, 8, 20, dtype=torch.float64)
    first[:, :3], second[:, 10:13] = normal(2, 8, 3)
    structure = make(3)
    state, average = averaged(structure, [mean_of(x) for x in [first] * 5 + [second] * 60], decay=0.8)
    assert (to_dense(structure.operator(state)) - average).norm() < 0.02 * average.norm()


@BOTH
@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_float32_preconditions_as_float64_where_one_direction_stands_out(make, damping):
    """Raw pixels: fewer rows than columns, the mean's eigenvalue 1e9 times the damping."""
    rows = torch.randint(0, 256, (16, 784), generator=torch.Generator().manual_seed(0)).double()
    gradient, found = rows.mT @ normal(16, 1), []
    for dtype in (torch.float32, torch.float64):
        state, _ = averaged(make(32), [mean_of(rows.to(dtype))] * 3, 0.95)
        found.append(make(32).inverse(state, damping).matvec(gradient.to(dtype)).double())
    # Never longer; the diagonal, which is rounding here, may make it shorter.
    assert found[0].norm() <= 1.1 * found[1].norm()
    if make is low_rank:
        assert (found[0] - found[1]).norm() <= 0.1 * found[1].norm()


@BOTH
def test_small_factors_are_held_densely(make):
    assert isinstance(make(8).fitted(10), DenseStructure) and isinstance(make(8).fitted(1), DenseStructure)
    assert make(8).fitted(11) == make(8)


def test_the_original_fit_takes_eigenpairs_of_what_is_off_the_diagonal():
    """Those of ``B - diag(B)`` that are positive, and no others."""
    rows = normal(9, 7) * torch.arange(1, 8)
    state, matrix = averaged(low_rank_plus_diagonal(2, fit="off_diagonal", iterations=100), [mean_of(rows)], 0.0)
    values, vectors = torch.linalg.eigh(matrix - torch.diag(matrix.diagonal()))
    expected = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].mT
    held = state.vectors / torch.linalg.vector_norm(state.vectors, dim=0)
    torch.testing.assert_close(state.values.sort().values, values[-2:], rtol=1e-6, atol=1e-9)
    assert (held.mT @ expected @ held).diagonal().sum() > 0.9 * values[-2:].sum()


weights, shares = st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.05, 0.99)
structures = st.one_of(
    st.sampled_from([dense(), diagonal(), low_rank(2, residual="none")]),
    st.builds(lambda r, w: low_rank(r, weight=w), st.integers(1, 4), weights),
    st.builds(lambda r, w: low_rank_plus_diagonal(r, weight=w), st.integers(1, 4), weights),
)


@given(structures, covariances(8, torch.float64), st.floats(1e-3, 1e2), shares)
def test_numbers_of_a_factor(structure, covariance, share, part):
    """Those of the dense average, which a weight does not change, and inverse; the rank needed is the least."""
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
