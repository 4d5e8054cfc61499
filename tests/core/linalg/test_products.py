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

any_operator = operators(dtype=torch.float64) | low_rank_plus_diagonals(dtype=torch.float64)
plain = any_operator.filter(lambda operator: not isinstance(operator, Kronecker | EigenbasisKronecker))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def stacked(operator, shape):
    """Copies with other numbers along leading axes; an axis of length 3 or two axes."""
    return optree.tree_map(lambda x: torch.stack([x, 2 * x, 3 * x]).expand(*shape, 3, *x.shape), operator)


@given(any_operator, any_operator, st.integers(0, 2**16))
def test_the_last_column_apart_is_the_last_column(output, input, seed):
    torch.manual_seed(seed)
    x = torch.randn(output.dimension, input.dimension, dtype=torch.float64)
    expected = to_dense(output) @ x @ to_dense(input)
    close(two_sided(Kronecker(output, input), x, None)[0], expected)
    matrix, column = two_sided(Kronecker(output, input), x[:, :-1], x[:, -1])
    close(torch.cat([matrix, column[:, None]], dim=1), expected)
    matrix, column = of_rows(input, x[:, :-1], x[:, -1])
    close(torch.cat([matrix, column[:, None]], dim=1), x @ to_dense(input))
    ones = torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], dim=1)
    matrix, column = of_rows(input, x[:, :-1], x.new_ones(()))
    close(torch.cat([matrix, column[:, None]], dim=1), ones @ to_dense(input))
    close(of_columns(output, x), to_dense(output) @ x)


@given(plain, plain, st.sampled_from([(), (2,)]), st.integers(0, 2**16))
def test_stacked_is_one_by_one(output, input, shape, seed):
    torch.manual_seed(seed)
    x = torch.randn(*shape, 3, output.dimension, input.dimension, dtype=torch.float64)
    both = stacked(Kronecker(output, input), shape)

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


low_rank = low_rank_plus_diagonals(dtype=torch.float64)


@given(low_rank, low_rank, st.sampled_from(["x", "output", "input"]))
def test_mapped_over_one_argument(output, input, which):
    """Nothing is changed in place that lacks the axis."""
    given = {"x": torch.ones(output.dimension, input.dimension).double(), "output": output, "input": input}
    many = optree.tree_map(lambda x: torch.stack([x, 2 * x]), given[which])
    of = lambda one: two_sided(Kronecker(*((given | {which: one})[k] for k in ("output", "input"))),  # noqa: E731
                               (given | {which: one})["x"], None)[0]  # fmt: skip
    close(vmap(of)(many)[1], of(optree.tree_map(lambda x: x[1], many)))


@given(low_rank, low_rank, st.booleans())
def test_derivatives(output, input, isotropic):
    """With respect to the matrix, by torch.func and by ``backward``: both operators are symmetric."""
    if isotropic:
        input = input._replace(diagonal=input.diagonal[:1].expand(input.dimension))
    x = torch.randn(output.dimension, input.dimension, dtype=torch.float64)
    v = torch.randn_like(x)
    both = Kronecker(output, input)
    expected = to_dense(output) @ v @ to_dense(input)
    close(grad(lambda x: (two_sided(both, x, None)[0] * v).sum())(x), expected)
    x.requires_grad_()
    diagonal = input.diagonal.clone().requires_grad_()
    (two_sided(Kronecker(output, input._replace(diagonal=diagonal)), x, None)[0] * v).sum().backward()
    close(x.grad, expected)
    close(diagonal.grad, ((to_dense(output) @ x.detach()) * v).sum(dim=0))


@pytest.mark.parametrize("joint", [False, True])
def test_nothing_larger_than_the_matrix_is_made(joint):
    d, r = 256, 3
    one = torch.ones(d + joint, r), torch.ones(r), torch.ones(d + joint)
    both = Kronecker(LowRankPlusDiagonal(torch.ones(d, r), torch.ones(r), torch.ones(d)), LowRankPlusDiagonal(*one))
    with LargestTensor() as largest:
        two_sided(both, torch.ones(d, d), torch.ones(d) if joint else None)
    assert largest.numel == d * d
