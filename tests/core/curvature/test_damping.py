"""Blocks that are smaller by orders of magnitude, and their dampings."""

import functools
import math

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import lrkfac
from lrkfac.core.curvature import refresh
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.blocks import initial_average, mean_eigenvalue_of
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal, unit_wise

STRUCTURES = {
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(2)),
    "dense": kronecker(dense(), dense()),
    "diagonal": kronecker(diagonal(), diagonal()),
    "corrected": kronecker(low_rank(2), low_rank(2), corrected=True),
    "unit-wise": unit_wise(),
    "layer-wise": layer_wise(),
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


@functools.cache
def problem(shares, width=5, n=6):
    """Equal layers on one input, of which each adds a share of its outputs: blocks in proportion to their squares."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = {f"l{i}": draw(width, width) / 2 for i in range(len(shares))}

    def model(p, x):
        return sum(share * F.linear(x, p[f"l{i}"]) for i, share in enumerate(shares))

    x, y = draw(n, width), torch.randint(width, (n,), generator=generator)
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    return layers, params, evaluate(params, x, y)


def dampings(shares, structure=None, damping=0.1, steps=2, **options):
    """Of each block, the product of those of its factors, after some steps; and the last updates."""
    layers, params, e = problem(shares)
    tx = lrkfac.precondition_by_fisher(layers, structure, decay=0.5, balanced=True, **options)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(e.grads, state, params, evaluation=e, factor_damping=damping)
    return {name: found.prod() for name, found in state.dampings.items()}, updates


def close(found, expected):
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shares", [(1.0, 0.1, 0.0317), (1e-4,)])
@each_structure
def test_blocks_within_three_decades_have_one_damping(shares, structure):
    layers, params, e = problem(shares)
    together = lrkfac.precondition_by_fisher(layers, structure, damping=0.1, decay=0.5)
    state = together.init(params)
    for _ in range(2):
        expected, state = together.update(e.grads, state, params, evaluation=e)
    each, updates = dampings(shares, structure)
    close(list(each.values()), [torch.tensor(0.1, dtype=torch.float64)] * len(shares))
    close(updates, expected)


@each_structure
def test_beyond_damping_is_in_proportion_to_the_blocks(monkeypatch, structure):
    """Together and one by one."""
    together = dampings((1.0, 0.1, 0.01), structure)
    close(together[0], {f"l{i}": torch.tensor(0.1 * 100.0**-i, dtype=torch.float64) for i in range(3)})
    monkeypatch.setitem(refresh.LARGEST, "cpu", 0)
    close(together, dampings((1.0, 0.1, 0.01), structure))


@pytest.mark.parametrize("shares, steps, expected", [
    ((1.0, math.sqrt(10**-3.25)), 2, [0.1, 0.1 * 10 ** (-3.25 / 2)]),  # halfway: the root of the proportion
    ((1.0, 1e-9, 0.0), 2, [0.1, 1e-7, 0.1]),  # no less than a millionth, but a silent block has it whole
    ((1.0, 1e-3), 1, [0.1, 0.1])])  # fmt: skip  # of the first statistics nothing is known
def test_between_and_at_the_ends(shares, steps, expected):
    each, updates = dampings(shares, STRUCTURES["dense"], steps=steps)
    assert [x.item() for x in each.values()] == pytest.approx(expected)
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(updates))


@pytest.mark.parametrize("structure", [*STRUCTURES.values(), full()], ids=[*STRUCTURES, "full"])
def test_mean_eigenvalue_is_that_of_the_explicit_block(structure):
    """``F = Σ_n a aᵀ ⊗ (diag(p) - p pᵀ) / N``, or the product of the means of both."""
    (layers, params, e), share = problem((0.3,)), 0.3
    (x,) = e.statistics.inputs["l0"]
    p = torch.softmax(share * F.linear(x, params["l0"]), dim=-1)
    a, b = x.square().sum(-1), share**2 * (1 - p.square().sum(-1))
    product = structure in (STRUCTURES["low rank"], STRUCTURES["dense"], STRUCTURES["diagonal"])
    expected = a.mean() * b.mean() if product else (a * b).mean()
    tx = lrkfac.precondition_by_fisher(layers, structure, decay=0.0)
    _, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
    (block,) = blocks(layers, structure, None)
    torch.testing.assert_close(mean_eigenvalue_of(block, state.factors[block.name]), expected / params["l0"].numel())


def test_of_groups_it_is_the_mean():
    structure, weight = STRUCTURES["low rank"], torch.randn(4, 6, 3, dtype=torch.float64)
    layers = lrkfac.find_layers(lambda p, x: F.conv1d(x, p, groups=2).mean(2), weight, torch.ones(5, 12, 6).double())
    (block,) = blocks(layers, structure, None)
    draw = lambda leaf: torch.rand_like(leaf) if leaf.is_floating_point() else leaf  # noqa: E731
    state = optree.tree_map(draw, initial_average(block, [weight]))
    each = vmap(lambda one: block.structure.operator(one).to_dense())(state)
    expected = each.diagonal(dim1=-2, dim2=-1).mean()
    torch.testing.assert_close(mean_eigenvalue_of(block, state), expected)
