"""Gradients of equal form, preconditioned together in few operations; the same as one by one: ``test_refresh.py``."""

from functools import partial

import optree
import pytest

from lrkfac import precondition_by_fisher
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature import precondition as natural
from lrkfac.structures import dense, kronecker, low_rank, unit_wise
from tests.core.curvature.test_refresh import Operations, deep, sizes  # noqa: F401

wide = partial(deep, width=24, norms=True)


def started(layers, params, evaluate, structure=None, **options):
    """Chain, state after a refresh, and the next gradients."""
    tx = precondition_by_fisher(layers, structure, **options)
    e = evaluate(params)
    state = tx.update(e.grads, tx.init(params), params, evaluation=e)[1]
    return tx, state, evaluate(optree.tree_map(lambda p: 1.1 * p, params), False)


@pytest.mark.parametrize("thin, numbers", [(True, 2 * 4 * 24), (False, 24 * 24)])
def test_both_sides_of_the_largest(monkeypatch, sizes, thin, numbers):  # noqa: F811
    """Five layers, of which two fit together; with one number less, none does."""
    tx, state, e = started(*wide(5, thin=thin), kronecker(low_rank(2), low_rank(2)))
    assert {isinstance(e.grads[f"l{i}"]["w"], LazyMatrix) for i in range(5)} == {thin}
    for largest, expected in ((2 * numbers, [2, 2, 1]), (2 * numbers - 1, [1] * 5)):
        sizes[1].clear()
        monkeypatch.setitem(natural.LARGEST, "cpu", largest)
        tx.update(e.grads, state, evaluation=e)
        assert sizes[1] == [1, *expected, 5, 1]  # the first norm is wider, without a shift; the last layer is smaller


@pytest.mark.parametrize(
    "structure, thin", [(None, True), (None, False), (kronecker(dense(), dense()), True), (unit_wise(), False)]
)
def test_depth_hardly_changes_the_number_of_operations(structure, thin):
    """But for what sorts the leaves: what is made of each layer alone are a few views."""
    made = []
    for depth in (4, 16):
        tx, state, e = started(*wide(depth, thin=thin), structure)
        with Computing() as count:
            tx.update(e.grads, state, evaluation=e)
        made.append(count.made)
    assert made[1] <= made[0] + 6


class Computing(Operations):
    """Counts operations, but for views."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made -= func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)
