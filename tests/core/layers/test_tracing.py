"""Capture: the inputs of layers and the gradients at their outputs; what is made of them is in ``test_coverage.py``."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vjp

from lrkfac import evaluator, find_layers, gaussian
from lrkfac.core.layers.probes import output_specs, zero_probes
from lrkfac.core.layers.tracing import Recorded, run_captured
from tests import cases, reference_networks

each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def captured(model, params, inputs, cotangent, layers=None):
    """Outputs, what the layers received, and the gradients of ``sum(cotangent * outputs)`` at theirs."""
    layers = layers or find_layers(model, params, inputs)
    probes = zero_probes(output_specs(model, layers, params, inputs))

    def run(probes):
        outputs, records = run_captured(model, layers, params, inputs, probes)
        return outputs, optree.tree_map(lambda use: use.input, records, is_leaf=lambda x: isinstance(x, Recorded))

    outputs, pullback, received = vjp(run, probes, has_aux=True)
    return outputs, received, pullback(cotangent(outputs))[0]


def cotangent(outputs):
    return normal(*outputs.shape, seed=7)


@each_case
def test_records_and_output_gradients_are_those_of_the_reference(case):
    expected, inputs = reference_networks.forward(case)
    outputs, received, gradients = captured(case.model, case.params, case.inputs, cotangent)
    assert torch.equal(outputs, expected)
    at_outputs = reference_networks.output_gradients(case, cotangent(outputs))
    assert set(received) == set(gradients) == {f"{name}.weight" for name in case.layers}
    assert received["0.weight"][0].data_ptr() == case.inputs.data_ptr(), "no copy is made"
    for name in case.layers:
        assert torch.equal(received[f"{name}.weight"][0], inputs[name])
        close(gradients[f"{name}.weight"][0], at_outputs[name])


def recurrent(params, x):
    """A weight used once for each position, with in-place changes between the uses."""
    h = F.linear(x[:, 0], params["w"], params["b"])
    for t in range(1, x.shape[1]):
        h = F.linear(h.tanh_() + x[:, t], params["w"], params["b"]).mul_(2)
    return h


@pytest.mark.parametrize(("length", "saw"), [(4, 4), (2, 2)])
def test_number_of_uses_is_checked(length, saw):
    params = {"w": normal(4, 4), "b": normal(4)}
    layers = find_layers(recurrent, params, normal(2, 3, 4))
    with pytest.raises(ValueError, match=f"layer 'w': expected 3 uses of 'w', saw {saw}.*describe the layers again"):
        captured(recurrent, params, normal(2, length, 4), cotangent, layers)


def test_shapes_cost_nothing_and_probes_no_memory():
    """Outputs of 2^40 numbers, which no machine holds."""
    x, params = torch.zeros(()).expand(2**30, 2**10), {"w": torch.zeros(()).expand(2**10, 2**10)}
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    specs = output_specs(model, find_layers(model, params, x), params, x)
    (probe,) = zero_probes(specs)["w"]
    assert probe.shape == (2**30, 2**10) and probe.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_outputs_are_kept(dtype):
    """Every layer's output is changed in place."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.Hardtanh(inplace=True)).to(dtype)
    model, x = lambda p, x: functional_call(net, p, (x,)), normal(5, 4).to(dtype)
    outputs, received, gradients = captured(model, dict(net.named_parameters()), x, torch.ones_like)
    assert torch.equal(outputs, net(x)) and outputs.dtype == dtype
    assert {x.dtype for x in optree.tree_leaves((received, gradients))} == {dtype}


def test_each_use_of_a_shared_weight_has_a_gradient_of_its_own():
    params, x = {"w": normal(3, 3, seed=1), "b": normal(3, seed=2)}, normal(4, 2, 3, seed=3)
    layers = find_layers(recurrent, params, x)
    e = evaluator(recurrent, gaussian(), layers, "exact")(params, x, normal(4, 3, seed=4))
    expected = grad(lambda p: 0.5 * (recurrent(p, x) - normal(4, 3, seed=4)).square().sum() / 4)(params)
    first, second = e.statistics.output_gradients["w"]
    assert first.shape == second.shape and not torch.equal(first, second)
    for name in params:
        close(e.grads[name], expected[name])
