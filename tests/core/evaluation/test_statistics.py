"""Statistics of some examples, and those without output gradients."""

from operator import attrgetter

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import evaluator, find_layers
from tests import cases
from tests.core.evaluation.test_evaluator import cost, each_estimator, evaluator_of, flops, noise_for
from tests.tensors import close

CASE = cases.LINEAR[0]
CASES = [CASE, cases.LINEAR[5], cases.SEQUENCE[2], cases.CONVOLUTION[1], cases.CONVOLUTION[3]]
each_case = pytest.mark.parametrize("case", CASES, ids=attrgetter("name"))


@each_case
@each_estimator
@settings(max_examples=2)
@given(data=st.data())
def test_statistics_of_some_examples_are_those_of_a_batch_of_them(case, estimator, data):
    """Loss, gradients, outputs and products stay those of the whole batch."""
    size, mc = len(case.inputs), estimator == "mc"
    samples = data.draw(st.integers(1, 2)) if mc else 1
    chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    numbers, noise = torch.tensor(chosen), noise_for(case, samples)[:, : len(chosen)] if mc else None
    f = evaluator_of(case, estimator, samples=samples)
    result = f(case.params, case.inputs, case.targets, examples=numbers, noise=noise)
    of_batch = f(case.params, case.inputs[numbers], case.targets[numbers], noise=noise).statistics
    close(result.statistics, of_batch._replace(residuals=()))
    whole = f(case.params, case.inputs, case.targets, statistics=False)
    close(result[:3], whole[:3])
    close((result.product(case.params), result.loss_at(case.params)), (whole.product(case.params), whole.loss))


@pytest.mark.parametrize("n", [1, 3])
def test_some_examples_cost_their_share(n):
    """Beside the gradient of all: a pass forward, for samples one back to the outputs of the layers, too."""
    case = cases.CONVOLUTION[0]
    forward, size, some = flops(lambda: case.model(case.params, case.inputs)), len(case.inputs), torch.arange(n)
    gradient = cost(case, "empirical")
    back = cost(case) - gradient
    assert size * (cost(case, "forward_only", examples=some) - gradient) == n * forward
    assert size * (cost(case, examples=some) - gradient) == n * (forward + back)


def test_inputs_that_are_shared_by_all_examples_stay_whole():
    """A tree of inputs: the batch is the leading axis of those as long as the targets."""
    w, x, scale = torch.randn(3, 5).double(), torch.randn(7, 5).double(), torch.randn(5).double()
    model = lambda p, i: F.linear(i["x"] * i["scale"], p["w"])  # noqa: E731
    inputs, targets, numbers = {"x": x, "scale": scale}, torch.randint(3, (7,)), torch.tensor([6, 2])
    f = evaluator(model, lrkfac.categorical(), find_layers(model, {"w": w}, inputs), "exact")
    result = f({"w": w}, inputs, targets, examples=numbers)
    alone = f({"w": w}, {"x": x[numbers], "scale": scale}, targets[numbers])
    close(result.statistics, alone.statistics._replace(residuals=()))


def test_examples_are_picked_along_the_axis_of_the_batch():
    """Axis 1 of the inputs, which outputs show; as if the others had not been there."""
    model = lambda p, x: F.linear(x.mean(0), p["w"])  # noqa: E731
    params, inputs, targets = {"w": torch.randn(3, 5)}, torch.randn(4, 7, 5), torch.randint(3, (7,))
    layers, numbers = find_layers(model, params, inputs), torch.tensor([5, 1])
    f = evaluator(model, lrkfac.categorical(), layers, "exact")
    some = f(params, inputs, targets, examples=numbers).statistics
    expected = f(params, inputs[:, numbers], targets[numbers]).statistics
    assert dict(layers.batch_axes) == {"": 1} and some.inputs["w"][0].shape == (2, 5)
    optree.tree_map(torch.testing.assert_close, some, expected._replace(residuals=()))


def test_named_layers_of_some_examples():
    """Both selections at once; those of other layers are empty; an empty tuple, or ``statistics=False``, takes none."""
    f, numbers = evaluator_of(CASE, "exact"), torch.tensor([3, 1])
    run = lambda **selection: f(CASE.params, CASE.inputs, CASE.targets, examples=numbers, **selection).statistics  # noqa: E731
    some, every = run(layers=("2",)), run()
    for part, expected in zip(some[:2], every[:2], strict=True):
        assert part == {**dict.fromkeys(part, ()), "2": part["2"]}
        close(part["2"], expected["2"])
    assert run(layers=()) is None and run(statistics=False, layers=("2",)) is None
