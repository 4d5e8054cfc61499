"""Jets inside ``torch.compile``, which follows no tensors of a class of their own: one graph, equal to eager code."""

import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import derivatives, evaluator, find_layers, laplacian
from tests.compiling import traced
from tests.core.layers.test_derivatives import LAYERED, NETWORKS, PAIRS, X, parameters

P = parameters((4, 3), (4,), (2, 4), (2,), (4,), (4, 4))
MORE = {
    "products and sums": lambda p, x: torch.sin(x @ p["w"].t() + p["b"]) @ p["v"].t() + p["c"],
    "gelu": lambda p, x: F.linear(F.gelu(F.linear(x, p["w"], p["b"])), p["v"], p["c"]) * (1 - x * x).prod(1, True),
    "layer_norm": lambda p, x: F.linear(F.layer_norm(F.linear(x, p["w"]), (4,), p["b"], p["b"]).sin(), p["v"], p["c"]),
}
OF_ATTRIBUTES = ("rearrangements", "parts", "products from the left")  # the compiler shows x.T to no mode


def close(x, expected):
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in OF_ATTRIBUTES])
def test_networks(name):
    torch.compiler.reset()
    function = derivatives(NETWORKS[name], PAIRS)
    close(traced(function)((), X), function((), X))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "one bias of two weights", *MORE])
def test_a_step_by_the_rows_of_layers(name):
    """The capture sees the same layers, whose biases have the constant input (1, 0, …, 0)."""
    torch.compiler.reset()
    model = laplacian((LAYERED | MORE)[name])
    layers = find_layers(model, P, X)
    evaluate = evaluator(model, lrkfac.gaussian(), layers, "exact")
    tx = lrkfac.precondition_in_sample_space(layers, 1e-2)
    targets = model(P, X).cos()

    def step(params):
        e = evaluate(params, X, targets)
        return e.loss, e.grads, tx.update(e.grads, tx.init(params), params, evaluation=e)[0]

    assert layers.layers
    close(traced(step)(P), step(P))


UNSEEN = {
    "a product": lambda _, x: x.T.T * x,
    "a sum": lambda _, x: x**2 + x.T.t() ** 3,
    "where": lambda _, x: torch.where(x.T.T > 0, x**3, x),
    "cat": lambda _, x: torch.cat([x**2, x.T.T], 1),
    "a keyword": lambda _, x: torch.add(x**2, other=x.mT.mT),
    "an index": lambda _, x: x**2 * torch.ones(len(x), x.shape[1], dtype=x.dtype)[x.T.argmax(0)],
    "vmap": lambda _, x: x**2 + torch.func.vmap(lambda one: one**3)(x),
    "a device": lambda _, x: x**2 * torch.arange(x.shape[1], device=x.device),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_mode_does_not_see_is_refused(name):
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"network: expected functions that torch\.compile shows, got"):
        traced(laplacian(UNSEEN[name]))((), X)


@pytest.mark.slow
def test_alone_it_does_not_depend_on_the_points():
    torch.compiler.reset()
    with pytest.raises(Exception, match="expected a tensor that depends on the points, got Tensor"):
        traced(laplacian(lambda _, x: x.T.T))((), X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a sum", "cat", "a device"])
def test_what_is_refused_falls_back_to_eager_code(name):
    """Where a graph may break, the derivatives are right all the same."""
    torch.compiler.reset()
    function = laplacian(UNSEEN[name])
    close(torch.compile(function, backend="eager")((), X), function((), X))


@pytest.mark.slow
def test_a_compiled_part_of_a_network():
    torch.compiler.reset()
    part = torch.compile(lambda x: (x**3).sin(), backend="eager")
    expected = laplacian(lambda _, x: (x**3).sin() + x**2 * (x**6).sin())((), X)
    close(laplacian(lambda _, x: part(x) + x**2 * part(x * x))((), X), expected)


@pytest.mark.slow
def test_new_tensors_are_on_the_device_of_the_points():
    torch.compiler.reset()
    function = laplacian(lambda _, x: x**3 * x.new_full((x.shape[1],), 2) + torch.ones_like(x))
    close(traced(function)((), X), 12 * X)


@pytest.mark.slow
def test_a_function_without_a_rule_is_refused_by_name():
    torch.compiler.reset()
    with pytest.raises(Exception, match="network: it applies sort to what depends on the points"):
        traced(laplacian(lambda _, x: x.sort(-1)[0]))((), X)
