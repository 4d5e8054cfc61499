"""Tree operations; what is not formed behaves as the matrix that it stands for."""

from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from lrkfac import apply_updates, materialize
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.tree_checks import check_like, paths
from lrkfac.core.base.trees import add_scaled, copied_or_lazy, counter, scaled, vdot, zeros_like

numbers = st.floats(-3, 3) | st.floats(-3, 3).map(lambda x: torch.tensor(x, dtype=torch.float64))
sizes = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))


@st.composite
def matrices(draw, size=None, kinds=(0, 1, 2)):
    """A leaf, held in some way, and the matrix that it stands for."""
    n, rows, columns = draw(sizes) if size is None else size
    torch.manual_seed(draw(st.integers(0, 2**16)))
    left, right = torch.randn(n, rows).double(), torch.randn(n, columns).double()
    terms = [(draw(numbers), torch.randn(rows, columns).double()) for _ in range(draw(st.integers(0, 2)))]
    kind = draw(st.sampled_from(kinds))
    matrix = left.mT @ right + (sum(c * x for c, x in terms) if kind == 1 else 0)
    held = [LazyMatrix(left, right, left.dtype), LazyMatrix(left, right, left.dtype, tuple(terms)), matrix]
    return held[kind], matrix


pairs = sizes.flatmap(lambda size: st.tuples(matrices(size), matrices(size)))


def close(found, expected):
    torch.testing.assert_close(materialize(found), expected, rtol=1e-12, atol=1e-12)


@given(pairs, numbers)
def test_trees_of_them(pair, scale):
    (x, dense_x), (y, dense_y) = pair
    assert tuple(x.shape) == tuple(dense_x.shape) and x.dtype == dense_x.dtype
    close({"w": x}, {"w": dense_x})
    close(scaled(scale, x), scale * dense_x)
    close(add_scaled(x, scale, y), dense_x + scale * dense_y)
    close(vdot(x, y), (dense_x * dense_y).sum())
    close(zeros_like(x), torch.zeros_like(dense_x))
    close(apply_updates(dense_x, y), dense_x + dense_y)
    close(x.t(), dense_x.mT)
    held = copied_or_lazy(x, dense_y)
    assert isinstance(held, LazyMatrix) == isinstance(x, LazyMatrix)
    close(scaled(2.0, held), 2 * dense_y)


@given(matrices(kinds=(0, 1)))
def test_the_dtype_is_that_of_the_matrix(leaf):
    x, matrix = leaf
    half = x.to(torch.bfloat16)
    assert half.dtype == half.dense().dtype == wide(half).dtype == torch.bfloat16
    torch.testing.assert_close(half.dense(), matrix.to(torch.bfloat16))
    assert apply_updates(matrix.float(), half).dtype == torch.float32
    assert scaled(torch.tensor(2.0).double(), half).dense().dtype == torch.bfloat16


def test_rows_in_half_precision_are_summed_in_float32():
    x = LazyMatrix(torch.full((5000, 1), 0.5).bfloat16(), torch.ones(5000, 1).bfloat16(), torch.bfloat16)
    one = torch.ones(1, 1).bfloat16()
    for y in (one, LazyMatrix(one, one, torch.bfloat16), LazyMatrix.of(one)):
        assert vdot(x, y) == vdot(y, x) == 2500 and vdot(x, y).dtype == torch.float32


@given(st.lists(numbers, min_size=1, max_size=3), st.sampled_from([torch.float64, torch.float32]))
def test_a_sum_of_terms_changes_none_of_them(coefficients, dtype):
    """The same under vmap, where nothing is changed in place."""
    terms = [(c, torch.randn(2, 3).double().to(dtype if i else torch.float64)) for i, c in enumerate(coefficients)]
    copies = [x.clone() for _, x in terms]
    held = LazyMatrix(torch.empty(0, 2), torch.empty(0, 3), torch.float64, tuple(terms))
    found, expected = held.unrounded(), sum(c * x.double() for c, x in terms)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, copy) for (_, x), copy in zip(terms, copies, strict=True))
    many = vmap(lambda s: LazyMatrix(held.left, held.right, held.dtype, ((s, terms[0][1]), *terms[1:])).unrounded())
    torch.testing.assert_close(many(torch.ones(2).double())[1], expected + (1 - coefficients[0]) * copies[0], rtol=1e-6,
                               atol=1e-6, check_dtype=False)  # fmt: skip


Pair = namedtuple("Pair", ["left", "right"])
TREE = {"b": [torch.ones(2), Pair(torch.ones(3), (torch.ones(1),))], "a": torch.ones(2, 2)}


def test_paths_name_every_leaf_in_the_order_of_optree():
    assert paths(TREE) == ("a", "b.0", "b.1.left", "b.1.right.0")
    assert paths({"0.weight": torch.ones(1)}) == ("0.weight",)
    assert [x.numel() for x in check_like(TREE, TREE, "thing")] == [4, 2, 3, 1]


def test_sums_of_all_leaves():
    """Half precision keeps its dtype, but sums in float32."""
    assert vdot(TREE, scaled(2.0, TREE)) == 2 * 10
    assert counter(TREE) == 0 and counter(TREE).dtype == torch.int64 and counter({}) == 0
    half = {"w": torch.full((5000,), 0.5, dtype=torch.bfloat16)}
    assert vdot(half, half) == 1250 and vdot(half, half).dtype == torch.float32
    assert add_scaled(half, torch.tensor(2.0), half)["w"].dtype == torch.bfloat16
    assert wide(half["w"]).dtype == torch.float32 and wide(torch.ones(1).double()).dtype == torch.float64


OTHERS = [
    ({"a": torch.ones(2, 2)}, r"thing: .*missing \['b.0', 'b.1.left', 'b.1.right.0'\], unexpected \[\]"),
    ({**TREE, "c": torch.ones(1)}, r"unexpected \['c'\]"),
    ({**TREE, "a": torch.ones(3)}, r"expected 'a' of shape \(2, 2\), got \(3,\)"),
    ({**TREE, "a": LazyMatrix.of(torch.ones(2, 3))}, r"expected 'a' of shape \(2, 2\), got \(2, 3\)"),
    ({**TREE, "a": torch.ones(5, 2, 2)}, r"got \(5, 2, 2\); .*; for a leading axis of members, map .*vmap\(tx.init\)"),
    ({**TREE, "a": 1.0}, "expected 'a' of shape .*, got float"),
    ({**TREE, "b": tuple(TREE["b"])}, "the tree differs"),
    (torch.ones(3), r"thing: .*one tensor in place of the entries \['a', 'b.0', 'b.1.left', 'b.1.right.0'\]"),
    (1.0, r"one value in place of the entries \['a', "),
]


@pytest.mark.parametrize("other, words", OTHERS)
def test_check_like_names_what_differs(other, words):
    with pytest.raises(ValueError, match=words):
        check_like(TREE, other, "thing")


def test_check_like_names_entries_in_place_of_a_tensor():
    with pytest.raises(ValueError, match=r"the entries \['c'\] in place of one tensor"):
        check_like(torch.ones(3), {"c": torch.ones(3)}, "thing")


@given(st.lists(st.sampled_from([(), (3,), (2, 3)]), min_size=1, max_size=3), st.floats(-2, 2), st.booleans())
def test_many_leaves_are_changed_as_one_by_one(shapes, number, as_tensor):
    """Bit for bit, in the dtype of the leaves; ``vmap`` takes another way."""
    torch.manual_seed(0)
    scale = torch.tensor(number) if as_tensor else number
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, y = ({i: torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)} for _ in range(2))
        for found, alone in ((scaled(scale, x), lambda a, b: scaled(scale, a)),
                             (add_scaled(x, scale, y), lambda a, b: add_scaled(a, scale, b))):  # fmt: skip
            for i, leaf in found.items():
                assert leaf.dtype == dtype and torch.equal(leaf, alone(x[i], y[i]))
        many, of_many = ({i: a.expand(4, *a.shape) for i, a in tree.items()} for tree in (x, y))
        mapped = vmap(lambda a, b: add_scaled(scaled(scale, a), number, b))(many, of_many)
        for i, leaf in mapped.items():
            expected = add_scaled(scaled(scale, x[i]), number, y[i])
            rounding = 8 * torch.finfo(dtype).eps  # of terms of size 4 or so, which may cancel
            torch.testing.assert_close(leaf[1], expected, rtol=rounding, atol=rounding)


def test_scales_have_derivatives():
    x, scale = [torch.ones(3), torch.ones(2)], torch.tensor(2.0, requires_grad=True)
    assert grad(lambda s: scaled(s, x)[0].sum())(torch.tensor(2.0)) == 3
    assert torch.autograd.grad(scaled(scale, x)[0].sum(), scale)[0] == 3
    assert jvp(lambda s: scaled(s, x)[1].sum(), (torch.tensor(2.0),), (torch.tensor(1.0),))[1] == 2
