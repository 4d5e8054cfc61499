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


@pytest.mark.slow
def test_what_the_mode_does_not_see_is_no_number():
    """Not a wrong one; alone, without anything else that depends on the points, it is an error."""
    torch.compiler.reset()
    assert traced(laplacian(lambda _, x: x.T.T * x))((), X).isnan().all()
    with pytest.raises(Exception, match="expected a tensor that depends on the points, got Tensor"):
        traced(laplacian(lambda _, x: x.T.T))((), X)


@pytest.mark.slow
def test_a_function_without_a_rule_is_refused_by_name():
    torch.compiler.reset()
    with pytest.raises(Exception, match="network: it applies sort to what depends on the points"):
        traced(laplacian(lambda _, x: x.sort(-1)[0]))((), X)
