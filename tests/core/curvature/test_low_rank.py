"""Low-rank factors: exact in what they promise, and near the best possible in the rest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkfac.core.curvature.factors import DenseStructure
from lrkfac.core.linalg.covariances import RowCovariance
from lrkfac.linalg import to_dense
from lrkfac.structures import low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_structure, covariances, dtypes, seeds
from tests import reference

STRUCTURES = {
    "low_rank": low_rank,
    "truncated": lambda rank: low_rank(rank, residual="none"),
    "by power iteration": lambda rank: low_rank(rank, method="power", iterations=3),
    "plus diagonal": low_rank_plus_diagonal,
    "off-diagonal": lambda rank: low_rank_plus_diagonal(rank, fit="off_diagonal"),
    "plus diagonal by power iteration": lambda rank: low_rank_plus_diagonal(rank, method="power", iterations=2),
    "low rank, weighted": lambda rank: low_rank(rank, weight=2.0),
    "plus diagonal, weighted": lambda rank: low_rank_plus_diagonal(rank, weight=0.5),
}
EVERY = pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES.keys())


def averaged(structure, batches, decay=0.9):
    """The structure's state after some batches, and the dense average."""
    state = structure.init(batches[0].rows.shape[1], batches[0].rows)
    for batch in batches:
        state = structure.update(state, batch, decay)
    return state, reference.running_averages([batch.dense().double() for batch in batches], decay)[-1]


def changing(d, n, steps, dtype=torch.float64, seed=0):
    """Batches from one distribution with a decaying spectrum in a rotated basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -2, d, dtype=torch.float64)
    rows = torch.randn(steps, n, d, generator=generator, dtype=torch.float64) * scales @ basis
    return [RowCovariance(x.to(dtype), torch.tensor(1 / n, dtype=dtype)) for x in rows]


@EVERY
@settings(max_examples=8)
@given(dimension=st.integers(1, 8), rank=st.integers(1, 9), dtype=dtypes, seed=seeds)
def test_laws(make, dimension, rank, dtype, seed):
    check_structure(make(rank), dimension, dtype=dtype, seed=seed)


@pytest.mark.parametrize("make", [make for name, make in STRUCTURES.items() if name != "off-diagonal"])
@settings(max_examples=8)
@given(covariance=covariances(12, torch.float64), decay=st.floats(0, 0.99))
def test_full_rank_is_exact(make, covariance, decay):
    structure = make(covariance.rows.shape[1])
    state, expected = averaged(structure, [covariance, RowCovariance(2 * covariance.rows, covariance.scale)], decay)
    assert (to_dense(structure.operator(state)) - expected).norm() <= 1e-12 * expected.norm()


@given(covariances(16), st.integers(1, 6), st.floats(0, 0.99), st.floats(0, 10))
def test_a_weight_multiplies_what_is_left_out_of_the_vectors_and_nothing_else(covariance, rank, decay, weight):
    """The average goes on unweighted."""
    batches = [covariance, RowCovariance(covariance.rows.flip(1), covariance.scale)]
    for make in (low_rank, low_rank_plus_diagonal):
        plain, weighted = make(rank), make(rank, weight=weight)
        (state, _), (same, _) = averaged(plain, batches, decay), averaged(weighted, batches, decay)
        assert all(torch.equal(x, y) for x, y in zip(state, same, strict=True))
        V, values = state.vectors, state.values
        d, identity = len(V), torch.eye(len(V), dtype=V.dtype)
        rest = torch.diag(state.diagonal) if make is low_rank_plus_diagonal else state.residual * (identity - V @ V.mT)
        expected = V * values @ V.mT + weight * rest
        tolerance = 100 * d * torch.finfo(V.dtype).eps * (1 + weight)
        assert (to_dense(weighted.operator(state)) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal, STRUCTURES["off-diagonal"]])
@given(covariances(16), st.integers(1, 6), st.floats(0, 0.99))
def test_low_rank_keeps_the_trace_and_with_a_diagonal_this(make, covariance, rank, decay):
    batches = [covariance, RowCovariance(covariance.rows.flip(1), covariance.scale)]
    state, expected = averaged(make(rank), batches, decay)
    tolerance = 100 * torch.finfo(covariance.rows.dtype).eps
    kept = to_dense(make(rank).operator(state)).double()
    assert (kept.trace() - expected.trace()).abs() <= tolerance * expected.trace()
    if make is not low_rank:
        assert (state.diagonal >= 0).all() and (state.values >= 0).all()
        assert (kept - expected).diagonal().abs().max() <= tolerance * expected.diagonal().max()


@pytest.mark.parametrize("rank", [2, 5, 10])
def test_low_rank_is_near_the_best_truncation(rank):
    state, average = averaged(low_rank(rank), changing(30, 20, 15))
    best = reference.truncated(average, rank, residual="isotropic")
    found = to_dense(low_rank(rank).operator(state))
    assert (found - average).norm() <= 1.1 * (best - average).norm()


@pytest.mark.parametrize("rank", [2, 5, 10])
def test_low_rank_plus_diagonal_is_near_the_fit_iterated_to_convergence(rank):
    generator = torch.Generator().manual_seed(1)
    loadings = torch.randn(30, rank, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 30, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 0.5, 30, dtype=torch.float64)
    rows = torch.randn(400, rank, generator=generator, dtype=torch.float64) @ loadings.mT + noise * scales
    batch = RowCovariance(rows, torch.tensor(1 / 400, dtype=torch.float64))
    structure = low_rank_plus_diagonal(rank)
    state, average = averaged(structure, [batch] * 160)
    vectors, values, diagonal = reference.low_rank_plus_diagonal_dense(average, rank)
    best = (vectors * values) @ vectors.mT + torch.diag(diagonal)
    truncated = reference.truncated(average, rank, residual="isotropic")
    found = to_dense(structure.operator(state))
    assert (found - average).norm() <= 1.1 * (best - average).norm()
    assert (found - average).norm() < (truncated - average).norm()


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal, STRUCTURES["by power iteration"]])
def test_a_new_direction_is_found_from_a_warm_basis(make):
    """The new direction is orthogonal to the warm basis: only fresh columns can find it."""
    d = 20
    first, second = torch.zeros(8, d, dtype=torch.float64), torch.zeros(8, d, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    first[:, :3] = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    second[:, 10:13] = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    batches = [RowCovariance(x, torch.tensor(1 / 8, dtype=torch.float64)) for x in [first] * 5 + [second] * 60]
    structure = make(3)
    state, average = averaged(structure, batches, decay=0.8)
    assert (to_dense(structure.operator(state)) - average).norm() < 0.02 * average.norm()


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal])
@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_float32_preconditions_as_float64_where_one_direction_stands_out(make, damping):
    """Raw pixels: fewer rows than columns, the mean's eigenvalue 1e9 times the damping."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (16, 784), generator=generator).double()
    gradient = rows.mT @ torch.randn(16, 1, generator=generator, dtype=torch.float64)
    found = {}
    for dtype in (torch.float32, torch.float64):
        batch = RowCovariance(rows.to(dtype), torch.tensor(1 / 16, dtype=dtype))
        structure = make(32)
        state = structure.init(784, batch.rows)
        for _ in range(3):
            state = structure.update(state, batch, 0.95)
        found[dtype] = structure.inverse(state, damping).matvec(gradient.to(dtype)).double()
    # Never longer; the diagonal, which is rounding here, may make it shorter.
    assert found[torch.float32].norm() <= 1.1 * found[torch.float64].norm()
    if make is low_rank:
        assert (found[torch.float32] - found[torch.float64]).norm() <= 0.1 * found[torch.float64].norm()


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal])
def test_small_factors_are_held_densely(make):
    assert isinstance(make(8).fitted(10), DenseStructure)
    assert make(8).fitted(11) == make(8)
    assert isinstance(make(8).fitted(1), DenseStructure)


def test_the_original_fit_takes_eigenpairs_of_what_is_off_the_diagonal():
    """Those of ``B - diag(B)`` that are positive, and no others."""
    rows = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 8)
    matrix = rows.mT @ rows / 9
    structure = low_rank_plus_diagonal(2, fit="off_diagonal", iterations=100)
    state = structure.update(structure.init(7, matrix), RowCovariance(rows, torch.tensor(1 / 9).double()), 0.0)
    values, vectors = torch.linalg.eigh(matrix - torch.diag(matrix.diagonal()))
    expected = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].mT
    held = state.vectors / torch.linalg.vector_norm(state.vectors, dim=0)
    torch.testing.assert_close(state.values.sort().values, values[-2:], rtol=1e-6, atol=1e-9)
    assert (held.mT @ expected @ held).diagonal().sum() > 0.9 * values[-2:].sum()
