"""Products from both sides are those of the dense matrices, stacked or not, whether the last column is apart or not."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.products import of_columns, of_rows, two_sided
from lrkfac.linalg import Kronecker, LowRankPlusDiagonal, to_dense
from lrkfac.testing import operators
from lrkfac.testing.strategies import low_rank_plus_diagonals
from tests.dispatch import LargestTensor

low_rank = low_rank_plus_diagonals(dtype=torch.float64)
any_operator = operators(dtype=torch.float64) | low_rank
plain = any_operator.filter(lambda operator: not isinstance(operator, Kronecker | EigenbasisKronecker))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def joined(parts):
    matrix, column = parts
    return torch.cat([matrix, column[..., None]], dim=-1)


@given(any_operator, any_operator, st.integers(0, 2**16))
def test_the_last_column_apart_is_the_last_column(output, input, seed):
    torch.manual_seed(seed)
    x = torch.randn(output.dimension, input.dimension, dtype=torch.float64)
    expected = to_dense(output) @ x @ to_dense(input)
    close(two_sided(Kronecker(output, input), x, None)[0], expected)
    close(joined(two_sided(Kronecker(output, input), x[:, :-1], x[:, -1])), expected)
    close(joined(of_rows(input, x[:, :-1], x[:, -1])), x @ to_dense(input))
    ones = torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], dim=1)
    close(joined(of_rows(input, x[:, :-1], x.new_ones(()))), ones @ to_dense(input))
    close(of_columns(output, x), to_dense(output) @ x)


@given(plain, plain, st.sampled_from([(), (2,)]), st.integers(0, 2**16))
def test_stacked_is_one_by_one(output, input, shape, seed):
    """Copies with other numbers along leading axes; an axis of length 3 or two axes."""
    torch.manual_seed(seed)
    x = torch.randn(*shape, 3, output.dimension, input.dimension, dtype=torch.float64)
    many = lambda x: torch.stack([x, 2 * x, 3 * x]).expand(*shape, 3, *x.shape)  # noqa: E731
    both = optree.tree_map(many, Kronecker(output, input))

    def of_each(function):
        for _ in range(len(shape) + 1):
            function = vmap(function)
        return function

    close(two_sided(both, x, None)[0], of_each(lambda o, i, x: two_sided(Kronecker(o, i), x, None)[0])(*both, x))
    found = two_sided(both, x[..., :-1], x[..., -1])
    close(found, of_each(lambda o, i, x: two_sided(Kronecker(o, i), x[:, :-1], x[:, -1]))(*both, x))
    found = of_rows(both.input, x[..., :-1], x.new_ones(()))
    close(found, of_each(lambda i, x: of_rows(i, x[:, :-1], x.new_ones(())))(both.input, x))
    close(of_rows(both.input, x, None)[0], of_each(lambda i, x: i.of_rows(x))(both.input, x))
    close(of_columns(both.output, x), of_each(of_columns)(both.output, x))


@given(low_rank, low_rank, st.sampled_from(["x", "output", "input"]))
def test_mapped_over_one_argument(output, input, which):
    """Nothing is changed in place that lacks the axis."""
    given = {"x": torch.ones(output.dimension, input.dimension).double(), "output": output, "input": input}
    of = lambda one: (lambda x, **both: two_sided(Kronecker(**both), x, None)[0])(**given | {which: one})  # noqa: E731
    many = optree.tree_map(lambda x: torch.stack([x, 2 * x]), given[which])
    close(vmap(of)(many)[1], of(optree.tree_map(lambda x: x[1], many)))


@given(low_rank, low_rank, st.booleans())
def test_derivatives(output, input, isotropic):
    """With respect to the matrix, by torch.func and by ``backward``: both operators are symmetric."""
    if isotropic:
        input = input._replace(diagonal=input.diagonal[:1].expand(input.dimension))
    x = torch.randn(output.dimension, input.dimension, dtype=torch.float64)
    v = torch.randn_like(x)
    of = lambda x, diagonal: (two_sided(Kronecker(output, input._replace(diagonal=diagonal)), x, None)[0] * v).sum()  # noqa: E731
    expected = to_dense(output) @ v @ to_dense(input), ((to_dense(output) @ x) * v).sum(dim=0)
    close(grad(of)(x, input.diagonal), expected[0])
    given = x.requires_grad_(), input.diagonal.clone().requires_grad_()
    of(*given).backward()
    close(tuple(leaf.grad for leaf in given), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_nothing_larger_than_the_matrix_is_made(joint):
    d, r = 256, 3
    one = torch.ones(d + joint, r), torch.ones(r), torch.ones(d + joint)
    both = Kronecker(LowRankPlusDiagonal(torch.ones(d, r), torch.ones(r), torch.ones(d)), LowRankPlusDiagonal(*one))
    with LargestTensor() as largest:
        two_sided(both, torch.ones(d, d), torch.ones(d) if joint else None)
    assert largest.numel == d * d
