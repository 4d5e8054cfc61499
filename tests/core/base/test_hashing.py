"""Numbers by a hash of their place: uniform, independent, and the same in any part, dtype and transformation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from lrkfac.core.base.hashing import hashed, new_seeds, uniform
from tests.marks import requires_compiler

SEEDS, ROWS, COLUMNS = 4000, 12, 8
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def seeds_of(*shape, seed=0):
    torch.manual_seed(seed)
    return new_seeds(*shape, device=torch.device("cpu"))


def finaliser(x):
    """MurmurHash3's, with the integers of Python."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_hashed_is_the_finaliser_of_murmurhash3(numbers):
    before = torch.tensor(numbers, dtype=torch.int32)
    after = hashed(before)
    assert [x % 2**32 for x in after.tolist()] == [finaliser(x % 2**32) for x in numbers]
    assert before.tolist() == numbers and finaliser(1) == 0x514E28B7


@given(shapes, st.integers(0, 2**16))
def test_equal_in_all_dtypes_and_never_0_or_1(shape, seed):
    one, numbers = seeds_of(seed=seed), torch.arange(9)
    single, double = (uniform(one, numbers, shape, dtype) for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32 and torch.equal(single.double(), double) and single.shape == (9, *shape)
    assert ((double * 2**24) % 2 == 1).all() and 0 < single.min() and single.max() < 1


def test_the_extremes_have_finite_logarithms():
    u = uniform(seeds_of(), torch.arange(2000), (10_000,))
    assert u.min() < 1e-6 and u.max() > 1 - 1e-6
    assert torch.log(-torch.log(u)).isfinite().all() and torch.erfinv(2 * u - 1).isfinite().all()


@given(shapes, st.integers(0, 2**16), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_a_part_is_cut_from_the_whole(shape, seed, numbers):
    one, numbers = seeds_of(seed=seed), torch.tensor(numbers)
    whole = uniform(one, numbers, shape)
    for i in range(len(numbers)):
        assert torch.equal(uniform(one, numbers[i:][:2], shape), whole[i:][:2])


def table():
    """Many draws of a small table, of mean 0 and variance 1, ``[draws, rows, columns]``."""
    draws = vmap(lambda seed: uniform(seed, torch.arange(ROWS), (COLUMNS,), torch.float64))(seeds_of(SEEDS))
    return (draws - 0.5) * 12**0.5


FUNCTIONS = {
    "itself": lambda x: x,
    "square": lambda x: (x.square() - 1) / 0.8**0.5,
    "cosine": lambda x: 2**0.5 * torch.cos(2 * torch.pi * x / 12**0.5),
    "fast cosine": lambda x: 2**0.5 * torch.cos(14 * torch.pi * x / 12**0.5),
}


@pytest.mark.parametrize("one", FUNCTIONS)
@pytest.mark.parametrize("other", FUNCTIONS)
def test_places_are_uncorrelated(one, other):
    """In many functions: each correlation, in units of its standard deviation, is normal."""
    x, y = (FUNCTIONS[name](table()).flatten(1) for name in (one, other))
    assert x.mean().abs() < 4 / x.numel() ** 0.5
    correlations = (x.mT @ y / SEEDS**0.5)[~torch.eye(ROWS * COLUMNS, dtype=torch.bool)]
    assert abs(correlations.std() - 1) < 0.05 and correlations.abs().max() < 5.5


def test_corners_of_rectangles_are_uncorrelated():
    """Keys of rows and columns add up, so that three corners of a rectangle give the sum at the fourth."""
    x = table()
    for name, f in FUNCTIONS.items():
        corners = f(x[:, :-1, :-1]) * f(x[:, :-1, 1:]) * f(x[:, 1:, :-1]) * f(x[:, 1:, 1:])
        assert corners.sum().abs() < 4 * corners.square().sum().sqrt(), name
    phase = 2 * torch.pi * (x[:, :-1, :-1] - x[:, :-1, 1:] - x[:, 1:, :-1] + x[:, 1:, 1:]) / 12**0.5
    assert phase.cos().mean().abs() < 4 / phase.numel() ** 0.5


def test_all_cells_are_equally_likely():
    """Pairs of neighbours: examples, entries, seeds; each falls into the cells of a chessboard equally often."""
    one = torch.stack([uniform(seed, torch.arange(300), (300,)) for seed in seeds_of(2)])
    pairs = {
        "examples": (one[:, 1:], one[:, :-1]),
        "entries": (one[..., 1:], one[..., :-1]),
        "seeds": (one[:1], one[1:]),
        "transposed": (one, one.mT),
    }
    for name, (x, y) in pairs.items():
        cells = (x * 16).long() * 16 + (y * 16).long()
        if name == "transposed":
            cells = cells[:, ~torch.eye(300, dtype=torch.bool)]
        counts = torch.bincount(cells.flatten(), minlength=256).double()
        expected = cells.numel() / 256
        degrees = 255 if name != "transposed" else 255 * 2  # each pair twice, in two orders
        assert ((counts - expected).square() / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5, name


def test_close_seeds_give_neither_equal_nor_moved_streams():
    """Two that differ in one bit, or by one."""
    base, numbers = seeds_of(), torch.arange(200)
    others = [base ^ torch.tensor(bits, dtype=torch.int32) for bits in ((1, 0), (0, 1), (1 << 16, 0), (0, 1 << 30))]
    others += [base + 1, base - 1]
    draws = [uniform(seed, numbers, (200,)) for seed in (base, *others)]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert torch.isin(x, y).double().mean() < 0.01
            near = torch.tensor([torch.corrcoef(torch.stack([x.flatten()[k:], y.flatten()[: 200**2 - k]]))[0, 1]
                                 for k in (0, 1, 2, 200, 201, 400)])  # fmt: skip
            assert near.abs().max() < 0.025


def test_mapped_over_seeds():
    seeds, numbers = seeds_of(5), torch.arange(4) * 3 + 1
    mapped = vmap(lambda seed: uniform(seed, numbers, (2, 3)))(seeds)
    assert all(torch.equal(mapped[i], uniform(seeds[i], numbers, (2, 3))) for i in range(5))
    drawn = vmap(lambda _: new_seeds(2, device=torch.device("cpu")), randomness="different")(torch.zeros(3))
    assert drawn.shape == (3, 2, 2) and len(drawn.unique()) == 12


@pytest.mark.slow
@requires_compiler
def test_compiled_bit_for_bit():
    seeds, numbers = seeds_of(3), torch.arange(40) * 7 + 2
    for shape in ((), (5,), (3, 17)):
        compiled = torch.compile(uniform, fullgraph=True)
        assert torch.equal(compiled(seeds[0], numbers, shape), uniform(seeds[0], numbers, shape))
    mapped = vmap(lambda seed: uniform(seed, numbers, (3, 17)))
    assert torch.equal(torch.compile(mapped, fullgraph=True)(seeds), mapped(seeds))
