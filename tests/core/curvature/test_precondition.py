"""Gradients of equal form, stacked and preconditioned together: the same as one by one, in fewer operations."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

import lrkfac
from lrkfac import materialize, precondition_by_fisher
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature import precondition as natural
from lrkfac.structures import dense, kronecker, low_rank
from tests.core.curvature.test_refresh import STRUCTURES, Operations, close

STRUCTURES = STRUCTURES | {
    "by name": {"l1.w": kronecker(dense(), low_rank(2)), "l[02].w": kronecker(low_rank(3), low_rank(2))},
    "by a function": lambda layer: kronecker(low_rank(1), low_rank(2)) if layer.name in ("l1.w", "l3.w") else None,
}


def deep(depth, width=24, n=4, dtype=torch.float64, bias="joint", transposed=False, thin=True):
    """``depth`` equal layers with norms of two widths between them, and a last layer of another size."""
    generator = torch.Generator().manual_seed(depth)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    params = {f"l{i}": {"w": draw(width, width) / 4, "b": draw(width), "s": 1 + draw(width) / 9, "t": draw(width)}
              for i in range(depth)} | {"out": {"w": draw(3, width)}, "first": {"s": draw(2 * width)}}  # fmt: skip

    def model(p, x):
        x = (torch.cat([x, x], dim=-1) * p["first"]["s"])[..., :width]
        for own in (p[f"l{i}"] for i in range(depth)):
            x = x @ own["w"].T + own["b"] if transposed else F.linear(x, own["w"], own["b"])
            x = torch.tanh(F.layer_norm(x, (width,), own["s"], own["t"]))
        return F.linear(x, p["out"]["w"])

    x, y = draw(n, width), torch.randint(3, (n,), generator=generator)
    layers = lrkfac.find_layers(model, params, x, bias=bias)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical", thin=thin)
    return layers, params, lambda p, statistics=True: evaluate(p, x, y, statistics)


def started(layers, params, evaluate, structure=None, **options):
    """Chain, state after a refresh, and the next gradients."""
    tx = precondition_by_fisher(layers, structure, **options)
    e = evaluate(params)
    state = tx.update(e.grads, tx.init(params), params, evaluation=e)[1]
    return tx, state, evaluate(optree.tree_map(lambda p: 1.1 * p, params), False)


def updates(tx, state, e):
    return materialize(tx.update(e.grads, state, evaluation=e)[0])


@pytest.fixture
def sizes(monkeypatch):
    """Of the groups that are stacked."""
    seen, real = [], natural.apply
    monkeypatch.setattr(natural, "apply", lambda *args: seen.append(len(args[2])) or real(*args))
    return seen


OPTIONS = [{}, {"thin": False}, {"bias": "separate"}, {"transposed": True}, {"transposed": True, "thin": False}]
PAIRS = [(structure, {}) for structure in STRUCTURES.values()] + [
    (STRUCTURES[name], options) for name in ("low rank", "dense", "by name") for options in OPTIONS[1:]
]


@pytest.mark.parametrize("structure, options", PAIRS)
def test_together_equals_one_by_one(monkeypatch, sizes, structure, options):
    problem = deep(4, **options)
    tx, state, e = started(*problem, structure)
    held = {name for name, one in e.grads.items() if isinstance(one.get("w"), LazyMatrix)}
    assert held == ({f"l{i}" for i in range(4)} if options.get("thin", True) else set())
    sizes.clear()
    found = updates(tx, state, e)
    assert sum(size > 1 for size in sizes) >= 2  # of products, and of units
    monkeypatch.setitem(natural.LARGEST, "cpu", 0)
    sizes.clear()
    expected = updates(tx, state, e)
    assert set(sizes) == {1}
    close(found, expected)


@pytest.mark.parametrize("thin, numbers", [(True, 2 * 4 * 24), (False, 24 * 24)])
def test_both_sides_of_the_largest(monkeypatch, sizes, thin, numbers):
    """Five layers, of which two fit together; with one number less, none does."""
    tx, state, e = started(*deep(5, thin=thin), kronecker(low_rank(2), low_rank(2)))
    for largest, expected in ((2 * numbers, [2, 2, 1]), (2 * numbers - 1, [1] * 5)):
        sizes.clear()
        monkeypatch.setitem(natural.LARGEST, "cpu", largest)
        updates(tx, state, e)
        assert sizes == [1, *expected, 5, 1]  # the first norm is wider and has no shift; the last layer is smaller


UNIT_WISE = lrkfac.structures.unit_wise()


@pytest.mark.parametrize(
    "structure, thin", [(None, True), (None, False), (STRUCTURES["dense"], True), (UNIT_WISE, False)]
)
def test_depth_hardly_changes_the_number_of_operations(structure, thin):
    """But for what sorts the leaves: what is made of each layer alone are a few views."""
    made = []
    for depth in (4, 16):
        tx, state, e = started(*deep(depth, thin=thin), structure)
        with Computing() as count:
            tx.update(e.grads, state, evaluation=e)
        made.append(count.made)
    assert made[1] <= made[0] + 6


class Computing(Operations):
    """Counts operations, but for views."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made -= func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_of_half_precision():
    tx, state, e = started(*deep(3, dtype=torch.bfloat16), damping=10.0)
    held = tx.update(e.grads, state, evaluation=e)[0]
    assert {leaf.dtype for leaf in optree.tree_leaves(held)} == {torch.bfloat16}
    wide = e._replace(grads=optree.tree_map(lambda g: g.to(torch.float32), materialize(e.grads)))
    for a, b in zip(optree.tree_leaves(materialize(held)), optree.tree_leaves(updates(tx, state, wide)), strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.parametrize("thin", [True, False])
def test_under_vmap_and_derivatives(thin):
    """Of an ensemble's gradients, and the derivative along them: the update is linear in the gradients."""
    tx, state, e = started(*deep(3, thin=thin))
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
