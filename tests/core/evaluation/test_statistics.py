"""Statistics of some examples, and those without output gradients."""

from operator import attrgetter

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import lrkfac
from lrkfac import evaluator, find_layers
from tests import cases
from tests.compiling import traced
from tests.core.evaluation.test_evaluator import (
    close,
    described,
    each_estimator,
    flops,
    layers_and_evaluate,
    likelihood,
    noise_for,
)

CASE = cases.LINEAR[0]
CASES = [CASE, cases.LINEAR[5], cases.SEQUENCE[2], cases.CONVOLUTION[1], cases.CONVOLUTION[3]]
each_case = pytest.mark.parametrize("case", CASES, ids=attrgetter("name"))


def of_sub_batch(case, estimator, numbers, noise, samples=1):
    """The whole evaluation of these examples alone."""
    f = layers_and_evaluate(case, estimator, samples=samples)
    noise = noise if estimator == "mc" else None
    return f(case.params, case.inputs[numbers], case.targets[numbers], noise=noise)


@each_case
@each_estimator
@given(data=st.data())
def test_statistics_of_some_examples_are_those_of_a_batch_of_them(case, estimator, data):
    """Loss, gradients, outputs and products stay those of the whole batch."""
    size, samples = len(case.inputs), data.draw(st.integers(1, 2)) if estimator == "mc" else 1
    chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    numbers, noise = torch.tensor(chosen), noise_for(case, samples)[:, : len(chosen)]
    f = layers_and_evaluate(case, estimator, samples=samples)
    found = f(case.params, case.inputs, case.targets, statistics=numbers, noise=noise if estimator == "mc" else None)
    close(found.statistics, of_sub_batch(case, estimator, numbers, noise, samples).statistics)
    whole = f(case.params, case.inputs, case.targets, statistics=False)
    close(found[:3], whole[:3])
    close(found.product(case.params), whole.product(case.params))
    close(found.loss_at(case.params), whole.loss)


def drawn_rows(examples, seed):
    torch.manual_seed(seed)
    f = layers_and_evaluate(CASE, "forward_only", examples=examples)
    rows = f(CASE.params, CASE.inputs, CASE.targets).statistics.inputs["0"][0]
    return [int(n) for n in (rows[:, None] == CASE.inputs).all(-1).nonzero()[:, 1]]


@given(st.integers(1, 9), st.integers(0, 2**16))
def test_examples_are_drawn_without_replacement(examples, seed):
    """From torch's generator; at most as many as there are."""
    found = drawn_rows(examples, seed)
    assert len(found) == len(set(found)) == min(examples, len(CASE.inputs))
    assert drawn_rows(examples, seed) == found


def test_every_example_is_drawn_equally_often():
    """In 700 draws of 2 of 7 examples, by members of an ensemble; the standard deviation of each count is 12."""
    f = layers_and_evaluate(CASE, "forward_only", examples=2)
    params = optree.tree_map(lambda p: p.expand(700, *p.shape), CASE.params)
    run = vmap(lambda p: f(p, CASE.inputs, CASE.targets)[4], randomness="different")
    same = (run(params).inputs["0"][0][:, :, None] == CASE.inputs).all(-1)
    counts = same.sum((0, 1))
    assert counts.sum() == 1400 and (counts - 200).abs().max() < 60


@each_estimator
def test_drawn_examples_are_those_of_a_batch_of_them(estimator):
    case, noise = cases.CONVOLUTION[3], noise_for(cases.CONVOLUTION[3])[:, :3]
    torch.manual_seed(3)
    found = layers_and_evaluate(case, estimator, examples=3)(
        case.params, case.inputs, case.targets, noise=noise if estimator == "mc" else None
    )
    torch.manual_seed(3)
    numbers = torch.randperm(len(case.inputs))[:3]
    close(found.statistics, of_sub_batch(case, estimator, numbers, noise).statistics)
    f = layers_and_evaluate(case, estimator, examples=3)
    assert f(case.params, case.inputs, case.targets, statistics=False).statistics is None
    first = noise[:, :1] if estimator == "mc" else None
    given_numbers = f(case.params, case.inputs, case.targets, statistics=torch.tensor([1]), noise=first)
    close(given_numbers.statistics, of_sub_batch(case, estimator, [1], first).statistics)


@pytest.mark.parametrize("n", [1, 3])
def test_some_examples_cost_their_share(n):
    """Beside the gradient of all: a pass forward, for samples one back to the outputs of the layers, too."""
    case = cases.CONVOLUTION[0]
    forward, size = flops(lambda: case.model(case.params, case.inputs)), len(case.inputs)

    def cost(estimator, **options):
        f = layers_and_evaluate(case, estimator, **options)
        f(case.params, case.inputs, case.targets)
        return flops(lambda: f(case.params, case.inputs, case.targets))

    gradient = cost("empirical")
    assert size * (cost("forward_only", examples=n) - gradient) == n * forward
    back = cost("mc") - gradient
    assert size * (cost("mc", examples=n) - gradient) == n * (forward + back)


@each_estimator
def test_examples_of_an_ensemble(estimator):
    """Numbers and parameters may be mapped over."""
    f, noise = layers_and_evaluate(CASE, estimator), noise_for(CASE)[:, :2]
    params = optree.tree_map(lambda p: torch.stack([p, p + 0.1]), CASE.params)
    numbers = torch.tensor([[0, 3], [5, 1]])
    run = lambda p, i: f(p, CASE.inputs, CASE.targets, statistics=i, noise=noise if estimator == "mc" else None)[4]  # noqa: E731
    found = vmap(run)(params, numbers)
    for i in range(2):
        member, alone = (optree.tree_map(lambda x, i=i: x[i], tree) for tree in (found, params))
        close(member, run(alone, numbers[i]))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["mc", "empirical"])
def test_examples_compiled(estimator):
    noise, numbers, f = (
        noise_for(CASE)[:, :3],
        torch.tensor([4, 0, 2]),
        layers_and_evaluate(CASE, estimator, examples=3),
    )

    def run(p, i):
        evaluation = f(p, CASE.inputs, CASE.targets, statistics=i, noise=noise if estimator == "mc" else None)
        return evaluation[:5], f(p, CASE.inputs, CASE.targets).statistics.inputs["0"][0]

    found, rows = traced(run)(CASE.params, numbers)
    close(found, run(CASE.params, numbers)[0])
    assert (rows[:, None] == CASE.inputs).all(-1).sum() == 3


def test_inputs_that_are_shared_by_all_examples_stay_whole():
    """A tree of inputs: the batch is the leading axis of those as long as the targets."""
    w, x, scale = torch.randn(3, 5).double(), torch.randn(7, 5).double(), torch.randn(5).double()
    model = lambda p, i: F.linear(i["x"] * i["scale"], p["w"])  # noqa: E731
    inputs, targets, numbers = {"x": x, "scale": scale}, torch.randint(3, (7,)), torch.tensor([6, 2])
    f = evaluator(model, lrkfac.categorical(), find_layers(model, {"w": w}, inputs), "exact")
    found = f({"w": w}, inputs, targets, statistics=numbers)
    alone = f({"w": w}, {"x": x[numbers], "scale": scale}, targets[numbers])
    close(found.statistics, alone.statistics)


def test_inputs_without_the_batch_in_front_are_refused():
    model = lambda p, x: F.linear(x.mean(0), p["w"])  # noqa: E731
    params, inputs, targets = {"w": torch.randn(3, 5)}, torch.randn(4, 7, 5), torch.randint(3, (7,))
    f = evaluator(model, lrkfac.categorical(), find_layers(model, params, inputs))
    with pytest.raises(ValueError, match=r"expected outputs of 2 examples, got the shape \(7, 3\)"):
        f(params, inputs, targets, statistics=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "statistics, error, message",
    [
        (torch.ones(7, dtype=torch.bool), ValueError, "numbers of some examples, .* got torch.bool of shape"),
        (torch.tensor(True), ValueError, r"got torch.bool of shape \(\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"got torch.int64 of shape \(0,\)"),
        (torch.tensor([[0, 1]]), ValueError, r"of shape \(1, 2\)"),
        (torch.tensor([0.0]), ValueError, "got torch.float32"),
        (torch.tensor([7]), ValueError, "statistics: expected numbers of examples from 0 to 6"),
        (
            [0, 1],
            TypeError,
            r"statistics: expected True, False, a tuple of names of layers or a tensor .* got \[0, 1\]",
        ),
        (1, TypeError, "statistics: expected True, False, a tuple of names of layers or a tensor .* got 1"),
    ],
)
def test_other_choices_of_statistics_are_refused(statistics, error, message):
    with pytest.raises(error, match=message):
        layers_and_evaluate(CASE)(CASE.params, CASE.inputs, CASE.targets, statistics=statistics)


def test_noise_has_the_shape_of_the_examples():
    with pytest.raises(ValueError, match=r"noise: expected uniform numbers of shape \(1, 2, 3\), got \(1, 7, 3\)"):
        layers_and_evaluate(CASE)(
            CASE.params, CASE.inputs, CASE.targets, statistics=torch.tensor([0, 1]), noise=noise_for(CASE)
        )


@each_case
def test_forward_only_holds_no_output_gradients(case):
    f = evaluator(case.model, likelihood(case), described(case), "forward_only")
    found = f(case.params, case.inputs, case.targets).statistics
    assert found.output_gradients == dict.fromkeys(case.layers, ())
    close(found.inputs, layers_and_evaluate(case, "exact")(case.params, case.inputs, case.targets).statistics.inputs)
