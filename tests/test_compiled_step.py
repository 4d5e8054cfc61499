"""A compiled training step: the same as eager, and compiled once."""

import optree
import pytest
import torch

import lrkfac
from lrkfac import kronecker
from tests.marks import requires_compiler
from tests.test_training_step import (
    FULL_RANK,
    GROUPS,
    MLP,
    STRIDE,
    NeverDense,
    NeverDensePlusDiagonal,
    chained,
    dense,
    never_dense,
    noises,
    stepper,
)


def mixed(layers):
    """The first layer low rank, the others dense."""
    first = kronecker(NeverDense(2), NeverDensePlusDiagonal(2))
    return chained(layers, {layers.layers[0].name: first, "*": kronecker(lrkfac.dense(), lrkfac.dense())})


@pytest.mark.slow
@requires_compiler
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")  # torch's own aten.diagonal
@pytest.mark.parametrize(
    "backend, case, make, estimator",
    [("inductor", STRIDE, mixed, "mc"), ("aot_eager", GROUPS, never_dense(1), "exact")],
    ids=["inductor", "aot_eager"],
)
def test_compiled_equals_eager(backend, case, make, estimator):
    """A step with statistics and one without, after an eager one; ``aot_eager`` spares the C++ compiler."""
    torch.compiler.reset()
    step, init = stepper(case, make, estimator)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    first, *noise = noises(case, 3)
    params, state, _ = step(case.params, init(case.params), case.inputs, case.targets, first)
    for u, statistics in zip(noise, (True, False), strict=True):
        given = (params, state, case.inputs, case.targets, u, statistics)
        expected, found = step(*given), compiled(*given)
        for a, b in zip(found[0::2], expected[0::2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert optree.tree_structure(found[1]) == optree.tree_structure(expected[1])
        params, state, _ = expected


MAKERS = {
    "never dense": never_dense(2),
    "sides swapped": FULL_RANK["sides swapped"],
    "dense": dense,
    "unit_wise": lambda layers: chained(layers, lrkfac.unit_wise()),
    "full": lambda layers: chained(layers, lrkfac.full()),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("case", [MLP, GROUPS], ids=lambda case: case.name)
def test_states_keep_their_layout(case, make):
    """Shapes, strides and dtypes of the first state are those of every later one: nothing is compiled twice."""
    step, init = stepper(case, make)
    layout = lambda state: optree.tree_map(lambda x: (x.shape, x.stride(), x.dtype), state)  # noqa: E731
    state = init(case.params)
    for noise, statistics in zip(noises(case, 3), (True, False, True), strict=True):
        _, after, _ = step(case.params, state, case.inputs, case.targets, noise, statistics)
        assert layout(after) == layout(state)
        state = after


@pytest.mark.slow
@requires_compiler
@pytest.mark.parametrize("make", [never_dense(2), dense], ids=["never dense", "dense"])
def test_step_is_compiled_once(make):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    step, init = stepper(GROUPS, make)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    params, state = GROUPS.params, init(GROUPS.params)
    for noise in noises(GROUPS, 3):
        params, state, _ = compiled(params, state, GROUPS.inputs, GROUPS.targets, noise)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
