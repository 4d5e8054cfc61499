"""Evaluators and evaluations travel; what an evaluator remembers is bounded and stays behind."""

import optree
import torch

import lrkfac
from lrkfac import evaluator, find_layers
from tests.travelling import each_way


def linear(params, inputs):
    return inputs @ params["w"].mT


def squared_error(outputs, targets):
    return (outputs - targets).square().sum(-1) / 2


LIKELIHOOD = lrkfac.Likelihood("any", squared_error, sample=torch.add, square_root=torch.mul)


@each_way
def test_copies_evaluate_the_same(way):
    """Evaluators, with one head or several, and the evaluations that they make, merged ones included."""
    params, inputs, noise = {"w": torch.randn(2, 3)}, torch.randn(4, 3), torch.rand(1, 4, 2)
    layers = find_layers(linear, params, inputs)
    for heads in (LIKELIHOOD, lrkfac.joint(LIKELIHOOD, 2.0)):
        f = evaluator(linear, heads, layers, thin=True)
        original = f(params, inputs, inputs[:, :2], noise=noise)
        again = way(f)
        assert again == f and hash(again) == hash(f) and not len(again.cache)
        for e in (again(params, inputs, inputs[:, :2], noise=noise), way(original)):
            optree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), e[:5], original[:5])
            assert torch.equal(e.product(params)["w"], original.product(params)["w"])
        merged = lrkfac.merge_evaluations([original, original])
        assert torch.equal(way(merged).quadratic(params, params), merged.quadratic(params, params))


def test_shapes_are_kept_for_the_latest_inputs_alone():
    params, calls = {"w": torch.randn(2, 3)}, []

    def model(params, inputs):
        calls.append(inputs.shape[0])
        return linear(params, inputs)

    f = evaluator(model, lrkfac.gaussian(), find_layers(model, params, torch.ones(2, 3)))
    run = lambda n: (calls.clear(), f(params, torch.ones(n, 3), torch.ones(n, 2)))  # noqa: E731
    for n in range(1, 41):
        run(n)
    assert len(f.cache) == f.cache.size == 16
    run(25)
    assert len(calls) == 1, "known, and now the latest"
    run(24)
    assert len(calls) == 2, "forgotten"
    run(25)
    assert len(calls) == 1


def test_inputs_that_are_no_tensors_have_shapes_of_their_own():
    """A number among the inputs decides a shape, also one that is seen again; objects that hide it are not kept."""
    params, x = {"w": torch.randn(4, 3), "b": torch.zeros(3)}, torch.randn(8, 5, 4)
    model = lambda p, inputs: inputs[0][:, : len(range(getattr(inputs[1], "stop", inputs[1])))] @ p["w"] + p["b"]  # noqa: E731
    f = evaluator(model, lrkfac.gaussian(), find_layers(model, params, (x, 5)), "exact")
    for number in (1, 5, slice(3), slice(2), 1):
        length = number.stop if isinstance(number, slice) else number
        e = f(params, (x, number), torch.zeros(8, length, 3))
        assert all(g[0].shape[2] == length for g in e.statistics.output_gradients.values())
