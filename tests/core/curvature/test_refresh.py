"""Blocks of equal form, stacked: the same as one by one, in a number of operations that depth does not change."""

from functools import cache, partial

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.curvature import phases, precondition, refresh, stacking
from lrkfac.core.curvature.spectral import SpectralStructure
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal, unit_wise

STRUCTURES = {
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(2)),
    "reduce": kronecker(low_rank_plus_diagonal(2), low_rank(2), treatment="reduce"),
    "dense": kronecker(dense(), dense()),
    "diagonal": kronecker(diagonal(), diagonal()),
    "exactly damped": kronecker(low_rank(2), low_rank_plus_diagonal(2), exact_damping=True),
    "exactly damped, reduce": kronecker(low_rank_plus_diagonal(2), dense(), treatment="reduce", exact_damping=True),
    "by name": {"l1": kronecker(dense(), low_rank(2)), "l[02]": kronecker(low_rank(3), low_rank(2))},
}

SPECTRAL = SpectralStructure(low_rank(2), low_rank(2), iterations=8)


def problem(model, params, draw, inputs, bias="joint", thin=False, estimator="empirical"):
    generator, x = torch.Generator().manual_seed(len(params)), draw(*inputs)
    classes = model(params, x).shape[-1]
    y = torch.randint(classes, inputs[:1], generator=generator)
    noise = torch.rand(1, len(y), classes, generator=generator).to(x.dtype) if estimator == "mc" else None
    layers = lrkfac.find_layers(model, params, x, bias=bias)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, thin=thin)
    return layers, params, lambda p, statistics=True, **some: evaluate(p, x, y, statistics, noise=noise, **some)


def drawing(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@cache  # which nothing changes
def deep(depth, width=6, positions=(), norms=False, transposed=False, dtype=torch.float64, **options):
    """``depth`` equal layers, also with norms of two widths between them, and a last layer of another size."""
    draw = drawing(depth, dtype)
    params = {f"l{i}": {"w": draw(width, width) / width**0.5, "b": draw(width)} for i in range(depth)}
    params["out"] = {"w": draw(3, width)}
    if norms:
        params = {name: layer | {"s": 1 + draw(width) / 9, "t": draw(width)} for name, layer in params.items()}
        params |= {"out": {"w": draw(3, width)}, "first": {"s": draw(2 * width)}}

    def model(p, x):
        x = (torch.cat([x, x], dim=-1) * p["first"]["s"])[..., :width] if norms else x
        for own in (p[f"l{i}"] for i in range(depth)):
            x = x @ own["w"].T + own["b"] if transposed else F.linear(x, own["w"], own["b"])
            x = torch.tanh(F.layer_norm(x, (width,), own["s"], own["t"]) if norms else x)
        return F.linear(x.mean(1) if positions else x, p["out"]["w"])

    return problem(model, params, draw, (4, *positions, width), **options)


@cache
def convolutions(depth, groups=1):
    draw = drawing(depth)
    params = {f"l{i}": {"w": draw(4, 4 // groups, 3, 3) / 6, "b": draw(4)} for i in range(depth)}
    params["out"] = {"w": draw(3, 4)}

    def model(p, x):
        for i in range(depth):
            x = torch.tanh(F.conv2d(x, p[f"l{i}"]["w"], p[f"l{i}"]["b"], padding=1, groups=groups))
        return F.linear(x.mean((2, 3)), p["out"]["w"])

    return problem(model, params, draw, (3, 4, 5, 4))


def run(layers, params, evaluate, structure, steps=3, **extra):
    tx = precondition_by_fisher(layers, structure, decay=0.7)
    state = tx.init(params)
    for i in range(steps):
        e = evaluate(optree.tree_map(lambda p, i=i: (1 + i / 10) * p, params))
        updates, state = tx.update(e.grads, state, params, evaluation=e, **extra)
    return lrkfac.materialize(updates), state


def layout(state):
    return optree.tree_map(lambda x: (tuple(x.shape), x.stride(), x.dtype), state)


def close(found, expected, atol=1e-9):
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


thin = partial(deep, 4, width=24, norms=True, thin=True)
PROBLEMS = {f"joint, {name}": (partial(deep, 5), structure) for name, structure in STRUCTURES.items()} | {
    "separate": (partial(deep, 5, bias="separate"), STRUCTURES["low rank"]),
    "samples": (partial(deep, 5, estimator="mc"), STRUCTURES["low rank"]),
    "shared": (partial(deep, 5, positions=(3,)), STRUCTURES["reduce"]),
    "norms": (partial(deep, 4, norms=True), STRUCTURES["low rank"]),
    "norms, transposed": (partial(deep, 4, norms=True, transposed=True), STRUCTURES["dense"]),
    "thin": (thin, STRUCTURES["low rank"]),
    "thin, by name": (thin, {f"{name}.w": structure for name, structure in STRUCTURES["by name"].items()}),
    "thin, by a function": (thin, lambda layer: STRUCTURES["reduce"] if layer.name in ("l1.w", "l3.w") else None),
    "thin, separate": (partial(thin, bias="separate"), STRUCTURES["dense"]),
    "thin, transposed": (partial(thin, transposed=True), STRUCTURES["low rank"]),
    "orthogonalized": (partial(deep, 5), SPECTRAL),
    "orthogonalized, norms": (partial(deep, 4, norms=True), SPECTRAL),
    "orthogonalized convolutions": (partial(convolutions, 4, groups=2), SPECTRAL),
    "convolutions": (partial(convolutions, 4), STRUCTURES["low rank"]),
    "convolutions, reduce": (partial(convolutions, 4), STRUCTURES["reduce"]),
    "grouped convolutions": (partial(convolutions, 4, groups=2), STRUCTURES["dense"]),
    "grouped convolutions, reduce": (partial(convolutions, 4, groups=2), STRUCTURES["reduce"]),
}


@pytest.fixture
def sizes(monkeypatch):
    refreshed, applied = [], []
    packed, of_apply = stacking.packed, precondition.apply
    monkeypatch.setattr(stacking, "packed", lambda x: [refreshed.append(len(one)) or one for one in packed(x)])
    monkeypatch.setattr(precondition, "apply", lambda *args: applied.append(len(args[2])) or of_apply(*args))
    return refreshed, applied


@pytest.mark.parametrize("make, structure", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_together_equals_one_by_one(monkeypatch, sizes, structure, make):
    """Updates; states, which are of the same form and layout and may be handed from one to the other."""
    layers, params, evaluate = make()
    updates, state = run(layers, params, evaluate, structure)
    assert max(sizes[0]) >= 2 and (max(sizes[1]) >= 2 or any(layer.groups > 1 for layer in layers))
    tx, e = precondition_by_fisher(layers, structure, decay=0.7), evaluate(params)
    together = lrkfac.materialize(tx.update(e.grads, state, params, evaluation=e)[0])
    for module in (stacking, precondition):
        monkeypatch.setitem(module.LARGEST, "cpu", 0)
    for numbers in sizes:
        numbers.clear()
    expected, alone = run(layers, params, evaluate, structure)
    assert set(sizes[0]) == set(sizes[1]) == {1} and layout(state) == layout(alone) == layout(tx.init(params))
    close(updates, expected)
    reached = lrkfac.materialize([tx.update(e.grads, start, params, evaluation=e)[0] for start in (state, alone)])
    close([reached[0], together], [reached[1]] * 2)


def test_statistics_beyond_the_largest_are_not_stacked_together(monkeypatch, sizes):
    """Five layers of 4 × (6 + 6) numbers each: two of them fit, and two, and one."""
    monkeypatch.setitem(stacking.LARGEST, "cpu", 2 * 48)
    run(*deep(5), STRUCTURES["low rank"], steps=1)
    assert sizes[0] == [2, 2, 1, 1]
    monkeypatch.setitem(stacking.LARGEST, "cpu", 2**24)
    monkeypatch.setattr(stacking, "LARGEST_OF_CONVOLUTIONS", 0)
    run(*convolutions(3), STRUCTURES["low rank"], steps=1)
    assert sizes[0][4:] == [1, 1, 1, 1]


class Operations(TorchDispatchMode):
    """Counts them, but for ``detach``, which computes nothing: each layer's statistics pass through it."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def operations_of(layers, params, evaluate, structure, statistics, count):
    tx, state = precondition_by_fisher(layers, structure), run(layers, params, evaluate, structure, steps=1)[1]
    e = evaluate(params, statistics)
    with count:
        tx.update(e.grads, state, params, evaluation=e)
    return count.made


@pytest.mark.parametrize("name", ["low rank", "dense", "diagonal"])
@pytest.mark.parametrize("make, deeper", [(partial(deep, width=8), 16), (convolutions, 16)])
def test_depth_does_not_change_the_number_of_operations(name, make, deeper):
    """Those of an update with statistics beyond those of one without."""
    of = lambda depth, statistics: operations_of(*make(depth), STRUCTURES[name], statistics, Operations())  # noqa: E731
    few, many = (of(depth, True) - of(depth, False) for depth in (4, deeper))
    assert 0 < many <= 1.2 * few


def recurrent():
    """A weight that is used twice, and one of another size."""
    draw = drawing(1)
    params = {"w": draw(6, 6) / 3, "out": draw(5, 6)}
    model = lambda p, x: F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, p["w"])), p["w"])), p["out"])  # noqa: E731
    return problem(model, params, draw, (4, 6))


@pytest.mark.parametrize("steps", [(1, 1), (3, 2), (2, 1)])
@pytest.mark.parametrize("make", [partial(deep, 5), partial(convolutions, 3, groups=2), recurrent])
def test_phases_lead_to_what_updates_do(monkeypatch, make, steps):
    """Between phases the eigenpairs of all layers are found together; factors differ in how often they need some."""
    structure = kronecker(low_rank(1, iterations=steps[0]), low_rank_plus_diagonal(1, iterations=steps[1]))
    found = run(*make(), structure)
    for module in (phases, refresh):
        monkeypatch.setattr(module, "takes_eigenpairs", lambda structure: [])
    close(found, run(*make(), structure))


@pytest.mark.parametrize("name", ["dense", "low rank"])
def test_the_layer_that_is_not_finite_is_named(name):
    layers, params, evaluate = deep(4)
    tx, e = precondition_by_fisher(layers, STRUCTURES[name]), evaluate(params)
    wrong = {**e.statistics.inputs, "l2": (e.statistics.inputs["l2"][0] * torch.nan,)}
    e = e._replace(statistics=e.statistics._replace(inputs=wrong))
    with pytest.raises(ValueError, match="layer 'l2': no inverse of its factors"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)


def test_the_stack_whose_average_is_not_finite_is_named():
    """Statistics are, so that they do not tell; the eigenpairs of all layers are found in one call."""
    layers, params, evaluate = deep(4)
    tx, e = precondition_by_fisher(layers, STRUCTURES["low rank"]), evaluate(params)
    state = tx.update(e.grads, tx.init(params), params, evaluation=e)[1]
    bad = optree.tree_map(lambda x: x * torch.nan if x.is_floating_point() else x, state.blocks["out"].average)
    blocks = state.blocks | {"out": state.blocks["out"]._replace(average=bad)}
    with pytest.raises(ValueError, match="layer 'out': no inverse of its factors"):
        tx.update(e.grads, state._replace(blocks=blocks), params, evaluation=e)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # of torch 2.11
def test_ranges_are_profiled():
    layers, params, evaluate = deep(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run(layers, params, evaluate, STRUCTURES["low rank"], steps=1)
    names = {event.key for event in seen.key_averages()}
    assert {"lrkfac.capture", "lrkfac.refresh", "lrkfac.inverse", "lrkfac.apply"} <= names


def test_convolutions_of_other_settings_are_not_stacked():
    """Equal shapes of inputs and outputs, but other rows: each block is as of a refresh by itself."""
    draw = drawing(0)
    model = lambda p, x: F.conv1d(F.conv1d(x, p["near"], padding=1).tanh(), p["far"], padding=2, dilation=2).mean(2)  # noqa: E731
    layers, params, evaluate = problem(model, {name: draw(2, 2, 3) for name in ("near", "far")}, draw, (5, 2, 9))
    tx, e = precondition_by_fisher(layers, STRUCTURES["dense"]), evaluate(params)
    _, state = tx.update(e.grads, tx.init(params), params, evaluation=e)
    for name, padding, dilation in (("near", 1, 1), ("far", 2, 2)):
        (a,) = e.statistics.inputs[name]
        rows = F.unfold(a[:, :, None], (1, 3), padding=(0, padding), dilation=(1, dilation))
        rows = rows.movedim(1, -1).reshape(-1, 6)
        close(state.factors[name].input.matrix, rows.mT @ rows / len(rows))


# Gradients of equal form, preconditioned together --------------------------------------------------------

wide = partial(deep, width=24, norms=True)


@pytest.mark.parametrize("thin, numbers", [(True, 2 * 4 * 24), (False, 24 * 24)])
def test_both_sides_of_the_largest(monkeypatch, sizes, thin, numbers):
    """Five layers, of which two fit together; with one number less, none does."""
    layers, params, evaluate = wide(5, thin=thin)
    assert {isinstance(evaluate(params).grads[f"l{i}"]["w"], LazyMatrix) for i in range(5)} == {thin}
    for largest, expected in ((2 * numbers, [2, 2, 1]), (2 * numbers - 1, [1] * 5)):
        sizes[1].clear()
        monkeypatch.setitem(precondition.LARGEST, "cpu", largest)
        run(layers, params, evaluate, kronecker(low_rank(2), low_rank(2)), steps=1)
        assert sizes[1] == [1, *expected, 5, 1]  # the first norm is wider, without a shift; the last layer is smaller


@pytest.mark.parametrize(
    "structure, thin", [(None, True), (None, False), (kronecker(dense(), dense()), True), (unit_wise(), False)]
)
def test_depth_hardly_changes_the_number_of_operations(structure, thin):
    """But for what sorts the leaves: what is made of each layer alone are a few views."""
    few, many = (operations_of(*wide(depth, thin=thin), structure, False, Computing()) for depth in (4, 16))
    assert many <= few + 6


class Computing(Operations):
    """Counts operations, but for views."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made -= func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)
