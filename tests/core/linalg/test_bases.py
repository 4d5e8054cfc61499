"""Orthonormal bases, by both ways: of the spans of leading columns, and orthonormal whatever the columns are."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import jvp, vmap

from lrkfac.core.linalg import bases
from lrkfac.core.linalg.bases import orthonormal, orthonormal_by_cholesky, pseudo_random
from lrkfac.structures import low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_structure, dtypes, seeds
from tests.core.curvature.test_low_rank import STRUCTURES
from tests.core.linalg.test_eigen import assert_orthonormal
from tests.tensors import normal

WAYS = pytest.mark.parametrize("way", [orthonormal, orthonormal_by_cholesky])
SPECIAL = {
    "zero": lambda x: 0 * x,
    "a zero column": lambda x: torch.cat([x[:, :-1], 0 * x[:, :1]], dim=1),
    "equal": lambda x: x[:, :1].expand_as(x),
    "repeated": lambda x: x[:, torch.arange(x.shape[1]) // 2],
    "nearly equal": lambda x: x[:, :1] + 1e-7 * x,
    "one row": lambda x: x * (torch.arange(len(x)) == 0)[:, None],
    "huge": lambda x: 1e36 * x / x.abs().max(),
    "subnormal": lambda x: 1e-44 * x,
    "of all sizes": lambda x: x * torch.logspace(-40, 37, x.shape[1], dtype=x.dtype),
}


def conditioned(d, k, condition, seed):
    """Columns of which the last singular value is ``1 / condition`` of the first."""
    left, right = torch.linalg.qr(normal(d, k, seed=seed)).Q, torch.linalg.qr(normal(k, k, seed=seed + 1)).Q
    return left * torch.logspace(0, -condition, k, dtype=torch.float64) @ right


@given(st.integers(1, 80), st.integers(1, 40), st.floats(0, 15), seeds, dtypes)
@example(2048, 36, 8.0, 0, torch.float32)
@example(300, 300, 8.0, 0, torch.float32)
def test_orthonormal_for_all_conditions(d, k, condition, seed, dtype):
    columns = conditioned(d, min(d, k), condition, seed).to(dtype)
    assert_orthonormal(orthonormal(columns))
    assert_orthonormal(orthonormal_by_cholesky(columns.float()))


@WAYS
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("d, k", [(1, 1), (3, 2), (36, 36), (40, 36), (64, 36), (1000, 20)])
def test_orthonormal_where_columns_are_zero_or_dependent_or_of_extreme_size(way, special, d, k):
    columns = special(normal(d, k)).float()
    assert columns.isfinite().all()
    assert_orthonormal(way(columns))
    for basis in way(torch.stack([columns, normal(d, k).float()])):
        assert_orthonormal(basis)


@WAYS
@given(st.integers(1, 20), st.integers(1, 8), seeds)
def test_leading_columns_keep_their_span(way, d, k, seed):
    columns = normal(d, min(d, k), seed=seed).float()
    columns = columns + torch.eye(*columns.shape) * 5  # of moderate condition, as are the leading ones
    basis = way(columns)
    assert (basis.mT @ columns).tril(-1).abs().max() <= 1e-5 * columns.norm()
    torch.testing.assert_close(basis @ (basis.mT @ columns), columns, rtol=1e-4, atol=1e-5)


@WAYS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_becomes_nan_there_alone(way, bad):
    columns = normal(2, 6, 3).float()
    columns[0, 2, 1] = bad
    bad_basis, good_basis = way(columns)
    assert bad_basis.isnan().any()
    assert_orthonormal(good_basis)


def test_derivatives_are_those_of_the_other_way():
    columns, direction = normal(7, 3).float(), normal(7, 3, seed=1).float()
    (one, of_one), (two, of_two) = (
        jvp(way, (columns,), (direction,)) for way in (orthonormal, orthonormal_by_cholesky)
    )
    signs = (one * two).sum(dim=0).sign()
    torch.testing.assert_close(one, signs * two, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_one, signs * of_two, rtol=1e-4, atol=1e-5)


def test_mapped_compiled_and_without_values():
    columns = normal(3, 9, 4).float()
    expected = torch.stack([orthonormal_by_cholesky(x) for x in columns])
    for found in (
        orthonormal_by_cholesky(columns),
        vmap(orthonormal_by_cholesky)(columns),
        torch.compile(orthonormal_by_cholesky, fullgraph=True, backend="aot_eager")(columns),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert orthonormal_by_cholesky(columns.to("meta")).shape == columns.shape


@pytest.mark.parametrize("make", [low_rank, low_rank_plus_diagonal, STRUCTURES["by power iteration"]])
def test_structures_keep_their_laws(make, monkeypatch):
    """As on a device on which bases are found by Cholesky factors."""
    calls = []
    monkeypatch.setattr(bases, "BY_CHOLESKY", {"cpu"})
    monkeypatch.setattr(bases, "orthonormal_by_cholesky", lambda x: calls.append(x) or orthonormal_by_cholesky(x))
    check_structure(make(3), 8, dtype=torch.float32)
    assert calls
    check_structure(make(3), 8)  # float64, for which there is no dtype of twice the precision


def test_pseudo_random_numbers_are_spread_and_depend_on_the_seed():
    first, second = (pseudo_random(200, 50, torch.tensor(seed)) for seed in (0, 1))
    assert first.min() >= -1 and first.max() < 1
    assert first.mean().abs() < 0.02 and (first.std() - 3**-0.5).abs() < 0.02
    assert (first.flatten() @ second.flatten()).abs() < 0.05 * first.norm() * second.norm()
    assert torch.linalg.cond(first) < 10
    known = [[648295168, -2100552832], [559084544, 842856576]]  # runs that go on from a file see the same
    assert (pseudo_random(2, 2, torch.tensor(3)) * 2**31).tolist() == known


@pytest.mark.parametrize("columns", [4, None])
def test_pseudo_random_columns_are_about_as_independent_as_random_ones(columns):
    """Also square matrices, in which numbers of equal distances without mixing are dependent."""
    for d in range(8, 70):
        x = pseudo_random(d, columns or d, torch.tensor(-1)).double()
        assert torch.linalg.cond(x) < 300 * d
    for seed in range(50):
        x = pseudo_random(33, 4, torch.tensor(seed)).double()
        assert torch.linalg.cond(x) < 10
