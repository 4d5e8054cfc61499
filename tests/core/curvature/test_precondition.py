"""Gradients of equal form, preconditioned together in few operations; the same as one by one: ``test_refresh.py``."""

from functools import partial

import optree
import pytest
import torch
from torch.func import grad, vmap

from lrkfac import materialize, precondition_by_fisher
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature import precondition as natural
from lrkfac.structures import dense, kronecker, low_rank, unit_wise
from tests.core.curvature.test_refresh import Operations, close, deep, sizes  # noqa: F401

wide = partial(deep, width=24, norms=True)


def started(layers, params, evaluate, structure=None, **options):
    """Chain, state after a refresh, and the next gradients."""
    tx = precondition_by_fisher(layers, structure, **options)
    e = evaluate(params)
    state = tx.update(e.grads, tx.init(params), params, evaluation=e)[1]
    return tx, state, evaluate(optree.tree_map(lambda p: 1.1 * p, params), False)


def updates(tx, state, e):
    return materialize(tx.update(e.grads, state, evaluation=e)[0])


@pytest.mark.parametrize("thin, numbers", [(True, 2 * 4 * 24), (False, 24 * 24)])
def test_both_sides_of_the_largest(monkeypatch, sizes, thin, numbers):  # noqa: F811
    """Five layers, of which two fit together; with one number less, none does."""
    tx, state, e = started(*wide(5, thin=thin), kronecker(low_rank(2), low_rank(2)))
    assert {isinstance(e.grads[f"l{i}"]["w"], LazyMatrix) for i in range(5)} == {thin}
    for largest, expected in ((2 * numbers, [2, 2, 1]), (2 * numbers - 1, [1] * 5)):
        sizes[1].clear()
        monkeypatch.setitem(natural.LARGEST, "cpu", largest)
        updates(tx, state, e)
        assert sizes[1] == [1, *expected, 5, 1]  # the first norm is wider, without a shift; the last layer is smaller


STRUCTURES = [(None, True), (None, False), (kronecker(dense(), dense()), True), (unit_wise(), False)]


@pytest.mark.parametrize("structure, thin", STRUCTURES)
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


@pytest.mark.parametrize("thin", [True, False])
def test_under_vmap_and_derivatives(thin):
    """Of an ensemble's gradients, and the derivative along them: the update is linear in the gradients."""
    tx, state, e = started(*wide(3, thin=thin))
    parts = optree.tree_map(lambda g: (g.left, g.right) if isinstance(g, LazyMatrix) else g, e.grads)

    def of(parts, scale=1.0):
        scaled = lambda g: LazyMatrix(scale * g[0], g[1], g[0].dtype) if isinstance(g, tuple) else scale * g  # noqa: E731
        grads = optree.tree_map(scaled, parts, is_leaf=lambda g: isinstance(g, tuple))
        return updates(tx, state, e._replace(grads=grads))

    many = vmap(of)(optree.tree_map(lambda g: torch.stack([g, 2 * g]), parts))
    close(optree.tree_map(lambda u: u[0], many), of(parts))
    total = lambda scale: sum(u.sum() for u in optree.tree_leaves(of(parts, scale)))  # noqa: E731
    one = torch.ones((), dtype=torch.float64)
    close(grad(total)(one), total(one))
