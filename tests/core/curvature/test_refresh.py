"""Blocks of equal form, stacked: the same as one by one, in a number of operations that depth does not change."""

from functools import partial

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.core.curvature import refresh
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal

STRUCTURES = {
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(2)),
    "reduce": kronecker(low_rank_plus_diagonal(2), low_rank(2), treatment="reduce"),
    "dense": kronecker(dense(), dense()),
    "diagonal": kronecker(diagonal(), diagonal()),
    "by name": {"l1": kronecker(dense(), low_rank(2)), "l[02]": kronecker(low_rank(3), low_rank(2))},
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


def deep(depth, width=6, n=4, dtype=torch.float64, bias="joint", positions=1):
    """``depth`` equal layers, and a last one of another size."""
    generator = torch.Generator().manual_seed(depth)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    params = {f"l{i}": {"w": draw(width, width) / 2, "b": draw(width)} for i in range(depth)}
    params["out"] = {"w": draw(3, width)}

    def model(p, x):
        for i in range(depth):
            x = torch.tanh(F.linear(x, p[f"l{i}"]["w"], p[f"l{i}"]["b"]))
        return F.linear(x, p["out"]["w"]).mean(1)

    x, y = draw(n, positions, width), torch.randint(3, (n,), generator=generator)
    layers = lrkfac.find_layers(model, params, x, bias=bias)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "mc")
    noise = torch.rand(1, n, 3, generator=generator, dtype=torch.float64).to(dtype)
    return layers, params, lambda p, statistics=True: evaluate(p, x, y, statistics, noise=noise)


def run(layers, params, evaluate, structure, steps=3, **extra):
    tx = precondition_by_fisher(layers, structure, decay=0.7)
    state = tx.init(params)
    for i in range(steps):
        e = evaluate(optree.tree_map(lambda p, i=i: (1 + i / 10) * p, params))
        updates, state = tx.update(e.grads, state, params, evaluation=e, **extra)
    return updates, state


def layout(state):
    return optree.tree_map(lambda x: (tuple(x.shape), x.stride(), x.dtype), state)


def close(found, expected, rtol=1e-9):
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def convolutions(depth, groups=1):
    """``depth`` equal convolutions, and a last linear layer."""
    generator = torch.Generator().manual_seed(depth)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = {f"l{i}": {"w": draw(4, 4 // groups, 3, 3) / 6, "b": draw(4)} for i in range(depth)}
    params["out"] = {"w": draw(3, 4)}

    def model(p, x):
        for i in range(depth):
            x = torch.tanh(F.conv2d(x, p[f"l{i}"]["w"], p[f"l{i}"]["b"], padding=1, groups=groups))
        return F.linear(x.mean((2, 3)), p["out"]["w"])

    x, y = draw(3, 4, 5, 4), torch.randint(3, (3,), generator=generator)
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")
    return layers, params, lambda p, statistics=True: evaluate(p, x, y, statistics)


PROBLEMS = {f"joint, {name}": (partial(deep, 5), structure) for name, structure in STRUCTURES.items()} | {
    "separate": (partial(deep, 5, bias="separate"), STRUCTURES["low rank"]),
    "shared": (partial(deep, 5, positions=3), STRUCTURES["reduce"]),
    "convolutions": (partial(convolutions, 4), STRUCTURES["low rank"]),
    "convolutions, reduce": (partial(convolutions, 4), STRUCTURES["reduce"]),
    "grouped convolutions": (partial(convolutions, 4, groups=2), STRUCTURES["dense"]),
    "grouped convolutions, reduce": (partial(convolutions, 4, groups=2), STRUCTURES["reduce"]),
}


def counting(monkeypatch, sizes):
    """Notes how many blocks each stack has."""
    real = refresh._refresh_stack
    monkeypatch.setattr(refresh, "_refresh_stack", lambda stack, *args: sizes.append(len(stack)) or real(stack, *args))


@pytest.mark.parametrize("make, structure", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_together_equals_one_by_one(monkeypatch, structure, make):
    """Updates; states, which are of the same form and layout and may be handed from one to the other."""
    problem, stacked = make(), []
    counting(monkeypatch, stacked)
    updates, state = run(*problem, structure)
    assert max(stacked) >= 2
    stacked.clear()
    monkeypatch.setitem(refresh.LARGEST, "cpu", 0)
    expected, alone = run(*problem, structure)
    assert set(stacked) == {1} and layout(state) == layout(alone)
    close(updates, expected)
    layers, params, evaluate = problem
    tx = precondition_by_fisher(layers, structure, decay=0.7)
    e, reached = evaluate(params), []
    for largest, start in ((0, state), (2**18, alone), (0, alone)):
        monkeypatch.setitem(refresh.LARGEST, "cpu", largest)
        reached.append(tx.update(e.grads, start, params, evaluation=e)[0])
    close(reached[0], reached[2])
    close(reached[1], reached[2])
    assert layout(state) == layout(tx.init(params))


def test_statistics_beyond_the_largest_are_not_stacked_together(monkeypatch):
    """Five layers of 4 × (6 + 6) numbers each: two of them fit, and two, and one."""
    sizes = []
    monkeypatch.setitem(refresh.LARGEST, "cpu", 2 * 48)
    counting(monkeypatch, sizes)
    run(*deep(5), STRUCTURES["low rank"], steps=1)
    assert sizes == [2, 2, 1, 1]
    sizes.clear()
    monkeypatch.setitem(refresh.LARGEST, "cpu", 2**24)
    monkeypatch.setattr(refresh, "LARGEST_OF_CONVOLUTIONS", 0)
    run(*convolutions(3), STRUCTURES["low rank"], steps=1)
    assert sizes == [1, 1, 1, 1]


class Operations(TorchDispatchMode):
    """Counts them, but for ``detach``, which computes nothing: each layer's statistics pass through it."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def operations_of_a_refresh(layers, params, evaluate, structure):
    """Those of an update with statistics beyond those of one without."""
    tx, made = precondition_by_fisher(layers, structure), []
    state = run(layers, params, evaluate, structure, steps=1)[1]
    for statistics in (True, False):
        e = evaluate(params, statistics)
        with Operations() as count:
            tx.update(e.grads, state, params, evaluation=e)
        made.append(count.made)
    return made[0] - made[1]


@pytest.mark.parametrize("name", ["low rank", "dense", "diagonal"])
@pytest.mark.parametrize("make, deeper", [(partial(deep, width=8), 32), (convolutions, 16)])
def test_depth_does_not_change_the_number_of_operations(name, make, deeper):
    few, many = (operations_of_a_refresh(*make(depth), STRUCTURES[name]) for depth in (4, deeper))
    assert 0 < many <= 1.2 * few


@each_structure
def test_under_vmap_over_dampings(structure):
    """As the quadratic model tries them."""
    problem = deep(3)
    dampings = torch.tensor([0.01, 0.1], dtype=torch.float64)
    found = vmap(lambda damping: run(*problem, structure, factor_damping=damping)[0])(dampings)
    for i in range(2):
        close(optree.tree_map(lambda x, i=i: x[i], found), run(*problem, structure, factor_damping=dampings[i])[0])


def test_the_layer_that_is_not_finite_is_named():
    layers, params, evaluate = deep(4)
    tx, e = precondition_by_fisher(layers, kronecker(dense(), dense())), evaluate(params)
    wrong = {**e.statistics.inputs, "l2": (e.statistics.inputs["l2"][0] * torch.nan,)}
    e = e._replace(statistics=e.statistics._replace(inputs=wrong))
    with pytest.raises(ValueError, match="layer 'l2': no inverse of its factors"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # of torch 2.11
def test_ranges_are_profiled():
    layers, params, evaluate = deep(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run(layers, params, evaluate, STRUCTURES["low rank"], steps=1)
    names = {event.key for event in seen.key_averages()}
    assert {"lrkfac.capture", "lrkfac.refresh", "lrkfac.inverse", "lrkfac.apply"} <= names


def test_convolutions_of_other_settings_are_not_stacked():
    """Equal shapes of inputs and outputs, but other rows: each block is as of a refresh by itself."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(2, 2, 3, generator=generator, dtype=torch.float64) for name in ("near", "far")}
    model = lambda p, x: F.conv1d(F.conv1d(x, p["near"], padding=1).tanh(), p["far"], padding=2, dilation=2).mean(2)  # noqa: E731
    x, y = torch.randn(5, 2, 9, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    layers = lrkfac.find_layers(model, params, x)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, x, y)
    tx = precondition_by_fisher(layers, STRUCTURES["dense"])
    _, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
    for name, padding, dilation in (("near", 1, 1), ("far", 2, 2)):
        (a,) = e.statistics.inputs[name]
        rows = F.unfold(a[:, :, None], (1, 3), padding=(0, padding), dilation=(1, dilation))
        rows = rows.movedim(1, -1).reshape(-1, 6)
        close(state.factors[name].input.matrix, rows.mT @ rows / len(rows))
