"""Capture: what the layers receive and the gradients at each use; that of all networks: ``test_evaluator.py``."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

from lrkfac import categorical, evaluator, find_layers, gaussian
from lrkfac.core.layers.probes import output_specs, zero_probes
from tests.compiling import traced
from tests.tensors import close, normal

PARAMS, X, Y = {"w": normal(3, 3, seed=1), "b": normal(3, seed=2)}, normal(4, 3, 3, seed=3), normal(4, 3, seed=4)


def recurrent(params, x):
    """A weight used once for each position, with in-place changes between the uses."""
    h = F.linear(x[:, 0], params["w"], params["b"])
    for t in range(1, x.shape[1]):
        h = F.linear(h.tanh_() + x[:, t], params["w"], params["b"]).mul_(2)
    return h


def test_each_use_of_a_shared_weight_has_a_gradient_of_its_own():
    e = evaluator(recurrent, gaussian(), find_layers(recurrent, PARAMS, X), "exact")(PARAMS, X, Y)
    gradients = e.statistics.output_gradients["w"]
    assert len({g.shape for g in gradients}) == 1 and not any(map(torch.equal, gradients[1:], gradients))
    close(e.grads, grad(lambda p: 0.5 * (recurrent(p, X) - Y).square().sum() / 4)(PARAMS))


@pytest.mark.parametrize("length", [4, 2])
def test_number_of_uses_is_checked(length):
    evaluate, x = evaluator(recurrent, gaussian(), find_layers(recurrent, PARAMS, X)), normal(4, length, 3)
    with pytest.raises(ValueError, match=f"layer 'w': expected 3 uses of 'w', saw {length}.*describe the layers again"):
        evaluate(PARAMS, x, Y)


def test_shapes_cost_nothing_and_probes_no_memory():
    """Outputs of 2^40 numbers, which no machine holds."""
    x, params = torch.zeros(()).expand(2**30, 2**10), {"w": torch.zeros(()).expand(2**10, 2**10)}
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    specs = output_specs(model, find_layers(model, params, x), params, x)
    (probe,) = zero_probes(specs)["w"]
    assert probe.shape == (2**30, 2**10) and probe.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_outputs_are_kept(dtype):
    """Every layer's output is changed in place; inputs are not copied."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.Hardtanh(inplace=True)).to(dtype)
    model, x = lambda p, x: functional_call(net, p, (x,)), normal(5, 4).to(dtype)
    params = {name: p.detach() for name, p in net.named_parameters()}
    e = evaluator(model, gaussian(), find_layers(model, params, x))(params, x, torch.zeros(5, 3, dtype=dtype))
    assert torch.equal(e.outputs, net(x)) and e.statistics.inputs["0"][0].data_ptr() == x.data_ptr()
    assert {x.dtype for x in optree.tree_leaves((e.outputs, e.statistics[:2]))} == {dtype}


@pytest.mark.slow
def test_an_attribute_that_the_compiler_hides_is_named():
    """``w.T`` reaches no function mode inside ``torch.compile``, ``w.t()`` does."""
    torch.compiler.reset()
    params, x, y = {"w": torch.randn(2, 3)}, torch.randn(5, 3), torch.arange(5) % 2

    def compiled(model):
        layers = find_layers(model, params, x)
        evaluate = evaluator(model, categorical(), layers, "empirical")
        return traced(evaluate)(params, x, y).grads["w"], evaluate(params, x, y).grads["w"]

    found, expected = compiled(lambda p, x: x @ p["w"].t())
    torch.testing.assert_close(found, expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"does not show the attributes \.T and \.mT: write"):
        compiled(lambda p, x: x @ p["w"].T)
