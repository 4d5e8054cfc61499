"""A compiled training step: the same as eager, and compiled once for refreshes and once for the steps between."""

from functools import cache, partial

import optree
import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac.structures import kronecker
from tests import cases
from tests.marks import requires_compiler
from tests.test_training_step import (
    WIDE,
    NeverDense,
    NeverDensePlusDiagonal,
    chained,
    dense,
    never_dense,
    noises,
    stepper,
)
from tests.transforms.test_base import trained

SMALL = cases.make_case("small", (cases.linear(3, 4), cases.tanh, cases.linear(4, 2)), (5, 3))
GROUPED = cases.make_case("grouped", (cases.conv2d(4, 4, (2, 2), groups=2), cases.tanh, cases.flatten), (3, 4, 3, 3))


def mixed(layers):
    """The first layer low rank, the others dense."""
    first = kronecker(NeverDense(2), NeverDensePlusDiagonal(2))
    others = kronecker(lrkfac.structures.dense(), lrkfac.structures.dense())
    return chained(layers, {layers.layers[0].name: first, "*": others})


MAKERS = {
    "low rank": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=3),
    "adaptive": lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=3, dense_up_to=0),
    "never dense": never_dense(2),
    "dense": dense,
    "spectral": lambda layers: lrkfac.spectral_kfac(layers, 0.01, rank=3),
    "spectral, no rate": lambda layers: lrkfac.spectral_kfac(layers, rank=3),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")  # torch's own aten.diagonal
@pytest.mark.parametrize(
    "backend, case, make, estimator",
    [
        pytest.param("inductor", SMALL, mixed, "mc", marks=requires_compiler, id="compiled"),
        pytest.param("eager", GROUPED, never_dense(2), "exact", id="groups, low rank"),
        pytest.param("eager", GROUPED, dense, "mc", id="groups, dense"),
        pytest.param("eager", WIDE, never_dense(2), "mc", id="gradients by rows"),
        pytest.param("eager", GROUPED, MAKERS["spectral"], "mc", id="groups, spectral"),
    ],
)
def test_a_compiled_step_equals_the_eager_one_and_is_two_graphs(backend, case, make, estimator):
    """One graph for refresh steps and one for the others, the first step included: no count of steps, nor the learning
    rate of a schedule, is a constant of theirs. ``eager`` is the tracer alone.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    step, init = stepper(case, make, estimator, thin=case is WIDE)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    params, state = case.params, init(case.params)
    for i, noise in enumerate(noises(case, 9)):
        batch = (params, state, case.inputs, case.targets, noise, i % 3 == 0)
        expected, actual = step(*batch), compiled(*batch)
        for a, b in zip(actual[0::2], expected[0::2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert optree.tree_structure(actual[1]) == optree.tree_structure(expected[1])
        params, state, _ = expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


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
    **{case.name: (case.model, case.params, case.inputs) for case in (SMALL, GROUPED)},
}
BLOCKS = {
    "unit_wise": lambda layers: chained(layers, lrkfac.structures.unit_wise()),
    "full": lambda layers: chained(layers, lrkfac.structures.full()),
}
LAYOUTS = {
    f"{spelled}, {name}": (spelled, make)
    for spelled in SPELLED
    for name, make in ({**MAKERS, **BLOCKS} if spelled in ("small", "grouped") else MAKERS).items()
}


@cache
def problem(spelled):
    model, params, inputs = SPELLED[spelled]
    params = {name: p + torch.randn_like(p) / 4 for name, p in params.items()}
    inputs, targets = inputs + torch.randn_like(inputs), torch.randint(2, (len(inputs),))
    return model, params, inputs, targets, lrkfac.find_layers(model, params, inputs)


@pytest.mark.parametrize("spelled, make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_stay(spelled, make):
    """Of parameters and states, so that nothing is compiled twice; no tensor stands in the adaptive chain's twice."""
    model, params, inputs, targets, layers = problem(spelled)

    def layout(params, state):
        leaves = optree.tree_leaves((params, state))
        assert make is not MAKERS["adaptive"] or len({id(x) for x in leaves}) == len(leaves)
        return [(x.shape, x.stride(), x.dtype) for x in leaves]

    for thin in (True, False):
        evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=thin), make(layers)
        first = layout(params, tx.init(params))
        for step in trained(tx, params, partial(evaluate, inputs=inputs, targets=targets), 4):
            assert layout(step.params, step.state) == first


@pytest.mark.slow
@pytest.mark.parametrize("name, estimator", [("low rank", "mc"), ("low rank", "exact"), ("dense", "empirical")])
def test_batches_of_other_sizes_need_no_new_graph(name, estimator):
    """One graph with statistics and one without, which hold for any size of the batch."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    step, init = stepper(SMALL, MAKERS[name], estimator)
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    params, state = SMALL.params, init(SMALL.params)
    for size in (23, 17, 29):
        inputs, targets, noise = torch.rand(size, 3).double(), torch.arange(size) % 2, torch.rand(1, size, 2).double()
        for statistics in (True, False):
            batch = (params, state, inputs, targets, noise if estimator == "mc" else None, statistics)
            expected, actual = step(*batch), compiled(*batch)
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-10)
            params, state, _ = expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
