"""A compiled training step: the same as eager, and compiled once for refreshes and once for the steps between."""

from collections import Counter

import optree
import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac.structures import kronecker
from tests import cases
from tests.marks import requires_compiler
from tests.test_training_step import NeverDense, NeverDensePlusDiagonal, chained, dense, never_dense, noises, stepper

SMALL = cases.make_case("small", (cases.linear(3, 4), cases.tanh, cases.linear(4, 2)), (5, 3))
GROUPED = cases.make_case("grouped", (cases.conv2d(4, 4, (2, 2), groups=2), cases.tanh, cases.flatten), (3, 4, 3, 3))


def mixed(layers):
    """The first layer low rank, the others dense."""
    first = kronecker(NeverDense(2), NeverDensePlusDiagonal(2))
    others = kronecker(lrkfac.structures.dense(), lrkfac.structures.dense())
    return chained(layers, {layers.layers[0].name: first, "*": others})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")  # torch's own aten.diagonal
@pytest.mark.parametrize(
    "backend, case, make, estimator",
    [
        pytest.param("inductor", SMALL, mixed, "mc", marks=requires_compiler, id="compiled"),
        pytest.param("eager", GROUPED, never_dense(2), "exact", id="groups, low rank"),
        pytest.param("eager", GROUPED, dense, "mc", id="groups, dense"),
    ],
)
def test_a_compiled_step_equals_the_eager_one_and_is_two_graphs(backend, case, make, estimator):
    """One graph for refresh steps and one for the others, the first step included; ``eager`` is the tracer alone."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    step, init = stepper(case, make, estimator)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    params, state = case.params, init(case.params)
    for noise, statistics in zip(noises(case, 4), (True, False, True, False), strict=True):
        batch = (params, state, case.inputs, case.targets, noise, statistics)
        expected, actual = step(*batch), compiled(*batch)
        for a, b in zip(actual[0::2], expected[0::2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert optree.tree_structure(actual[1]) == optree.tree_structure(expected[1])
        params, state, _ = expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


MAKERS = {
    "never dense": never_dense(2),
    "dense": dense,
    "unit_wise": lambda layers: chained(layers, lrkfac.structures.unit_wise()),
    "full": lambda layers: chained(layers, lrkfac.structures.full()),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("case", [SMALL, GROUPED], ids=lambda case: case.name)
def test_states_keep_their_layout(case, make):
    """Shapes, strides and dtypes of the first state are those of every later one: nothing is compiled twice."""
    step, init = stepper(case, make)
    layout = lambda state: optree.tree_map(lambda x: (x.shape, x.stride(), x.dtype), state)  # noqa: E731
    state = init(case.params)
    for noise, statistics in zip(noises(case, 3), (True, False, True), strict=True):
        _, after, _ = step(case.params, state, case.inputs, case.targets, noise, statistics)
        assert layout(after) == layout(state)
        state = after


def linear(p, x):
    return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"])


def product(p, x):
    return torch.tanh(x @ p["w"] + p["b"]) @ p["v"]


def convolution(p, x):
    return F.linear(torch.tanh(F.conv2d(x, p["w"], p["b"])).mean((2, 3)), p["v"])


LAST = torch.channels_last
SPELLED = {
    "linear": (linear, {"w": torch.ones(20, 24), "b": torch.ones(20), "v": torch.ones(3, 20)}, torch.ones(5, 24)),
    "product": (product, {"w": torch.ones(24, 20), "b": torch.ones(20), "v": torch.ones(20, 3)}, torch.ones(5, 24)),
    "channels last": (
        convolution,
        {"w": torch.ones(8, 6, 3, 3).to(memory_format=LAST), "b": torch.ones(8), "v": torch.ones(3, 8)},
        torch.ones(5, 6, 5, 5).to(memory_format=LAST),
    ),
}


@pytest.mark.parametrize("model, params, inputs", SPELLED.values(), ids=SPELLED)
@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_layouts_do_not_depend_on_spelling(model, params, inputs, thin, adaptive):
    """Those of parameters and later states, and that no tensor stands in the adaptive chain's state twice."""
    params = {name: p + torch.randn_like(p) / 4 for name, p in params.items()}
    inputs, targets = inputs + torch.randn_like(inputs), torch.randint(3, (5,))
    layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=thin)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=3) if adaptive else lrkfac.low_rank_kfac(layers, 0.1, rank=3)

    def layout(params, state):
        leaves = optree.tree_leaves((params, state))
        assert not adaptive or len({id(x) for x in leaves}) == len(leaves)
        return [(x.shape, x.stride(), x.dtype) for x in leaves]

    state = tx.init(params)
    first = layout(params, state)
    for statistics in (True, False, True, False):
        e = evaluate(params, inputs, targets, statistics=statistics)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        assert layout(params, state) == first


@pytest.mark.slow
def test_many_steps_are_compiled_twice():
    """One graph for refresh steps and one for the others, the first step included: no count of steps is a constant of
    theirs. The backend compiles nothing, so that only what the tracer decides is counted.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs, calls = [], Counter()
    draw = torch.Generator().manual_seed(0)

    def counting(graph, examples):
        number = len(graphs)
        graphs.append(graph)

        def call(*args):
            calls[number] += 1
            return graph.forward(*args)

        return call

    params = {name: torch.randn(size, generator=draw) / 4 for name, size in {"a": (16, 16), "b": (16,)}.items()}
    params["c"] = torch.randn(3, 16, generator=draw) / 4

    def model(p, x):
        return F.linear(torch.tanh(F.linear(x, p["a"], p["b"])), p["c"])

    x, y = torch.randn(4, 16, generator=draw), torch.randint(3, (4,), generator=draw)
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "mc", thin=True)
    rate = lrkfac.schedules.warmup_cosine_decay_schedule(0.0, 0.1, 20, 200)
    tx = lrkfac.low_rank_kfac(layers, rate, rank=3, weight_decay=1e-4)

    @torch.compile(fullgraph=True, backend=counting)
    def step(params, state, x, y, statistics, noise):
        e = evaluate(params, x, y, statistics, noise=noise)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state, e.loss

    state, losses = tx.init(params), []
    for i in range(200):
        noise = torch.rand(1, 4, 3, generator=draw)
        params, state, loss = step(params, state, x, y, i % 10 == 0, noise)
        losses.append(loss)
    assert len(graphs) == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert calls == {0: 20, 1: 180}
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
