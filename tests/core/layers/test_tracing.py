"""What passes through a layer, and the gradients at its outputs: ``mean of g aᵀ`` is autograd's gradient."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vjp, vmap

from lrkfac import find_layers
from lrkfac.core.layers.probes import output_specs, zero_probes
from lrkfac.core.layers.tracing import Recorded, run_captured
from tests import cases, reference, reference_networks
from tests.compiling import traced

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


def plain(model, params, inputs, cotangent):
    """Outputs, and autograd's gradient of ``sum(cotangent * outputs)``."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    outputs = model(leaves, inputs)
    grads = torch.autograd.grad((cotangent(outputs.detach()) * outputs).sum(), list(leaves.values()), allow_unused=True)
    return outputs.detach(), dict(zip(leaves, grads, strict=True))


def sum_of_products(layer, received, gradients):
    """``sum of g aᵀ`` over uses and rows as ``[groups, d_out, d_in]``, by the reference's unfolded rows."""
    total = 0
    for (site, use), options in zip(layer.sites, layer.options, strict=True):
        a, g = received[site][use], gradients[site][use]
        if layer.kind == "linear":
            a, g = reference.linear_input_rows(a, layer.bias is not None), reference.linear_output_rows(g)
        else:
            _, stride, padding, dilation, groups, *_ = options
            settings = (stride, 0, dilation, groups, layer.bias is not None)
            a = F.pad(a, [side for pair in reversed(padding) for side in pair])
            a = reference.conv2d_input_rows(a, layer.weight.shape, *settings)
            g = reference.conv2d_output_rows(g, groups)
        total = total + torch.einsum("grk,grd->gkd", g, a)
    return total


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


def of_module(net):
    return lambda params, x: functional_call(net, params, (x,))


def convolution(channels=4, kernel=3, **settings):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, channels, kernel, dtype=torch.float64, **settings), nn.Tanh(), nn.Flatten())


def activations():
    """Every layer's output is changed in place."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ELU(inplace=True),
                        nn.Linear(6, 3), nn.Hardtanh(inplace=True))  # fmt: skip
    return net.double()


IMAGES, ROWS = normal(3, 4, 7, 6), normal(5, 4)
MODULES = {
    "stride": (convolution(stride=2), IMAGES),
    "padding of a pair": (convolution(6, stride=(1, 2), padding=(1, 2)), IMAGES),
    "same": (convolution(padding="same"), IMAGES),
    "same, even kernel": (convolution(2, kernel=(2, 4), padding="same", dilation=(1, 2)), IMAGES),
    "valid": (convolution(padding="valid"), IMAGES),
    "dilation": (convolution(dilation=(2, 1)), IMAGES),
    "groups": (convolution(6, groups=2, padding=1), IMAGES),
    "depthwise": (convolution(8, groups=4), IMAGES),
    "circular": (convolution(padding=1, padding_mode="circular"), IMAGES),
    "reflect, even kernel": (convolution(kernel=2, padding="same", padding_mode="reflect"), IMAGES),
    "no bias": (convolution(bias=False), IMAGES),
    "in-place activations": (activations(), ROWS),
    "sequences": (activations(), normal(2, 3, 4)),
    "sequences of sequences": (activations(), normal(2, 3, 2, 4)),
}


@pytest.mark.parametrize(("net", "x"), MODULES.values(), ids=MODULES.keys())
def test_sum_of_g_a_is_the_gradient(net, x):
    is_the_gradient(of_module(net), dict(net.named_parameters()), x)


def is_the_gradient(model, params, x):
    expected, grads = plain(model, params, x, cotangent)
    layers = find_layers(model, params, x)
    outputs, received, gradients = captured(model, params, x, cotangent, layers)
    assert torch.equal(outputs, expected), "probes change nothing"
    for layer in layers:
        found = sum_of_products(layer, received, gradients)
        weight = grads[layer.weight.path].reshape(layer.groups, layer.d_out, -1)
        if layer.bias is not None:
            weight = torch.cat([weight, grads[layer.bias.path].reshape(layer.groups, -1, 1)], -1)
        close(found, weight)
    return layers


def recurrent(params, x):
    """A weight used once for each position, with in-place changes between the uses."""
    h = F.linear(x[:, 0], params["w"], params["b"])
    for t in range(1, x.shape[1]):
        h = F.linear(h.tanh_() + x[:, t], params["w"], params["b"]).mul_(2)
    return h


SHARED = {
    "twice": (lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).relu_(), p["w"], p["b"]), ROWS, 2),
    "side by side": (lambda p, x: F.linear(x, p["w"], p["b"]) * F.linear(x.flip(1), p["w"], p["b"]), ROWS, 2),
    "same input": (lambda p, x: F.linear(x, p["w"], p["b"]) * F.linear(x, p["w"], p["b"]), ROWS, 2),
    "recurrent": (recurrent, normal(2, 3, 4), 3),
    "bias in one use": (lambda p, x: F.linear(F.linear(x, p["w"], p["b"]), p["w"]), ROWS, 2),
    "other numbers of rows": (
        lambda p, x: F.linear(F.linear(torch.stack([x, x + 1]), p["w"], p["b"]).prod(0), p["w"], p["b"]),
        ROWS, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "x", "uses"), SHARED.values(), ids=SHARED.keys())
def test_weight_used_several_times(model, x, uses):
    (layer,) = is_the_gradient(model, {"w": normal(4, 4), "b": normal(4, seed=1)}, x)
    assert layer.uses == uses


def test_convolution_used_with_different_settings():
    def model(p, x):
        for settings in ({"stride": 2}, {"padding": "same"}, {"dilation": 2}):
            x = F.conv2d(x, p["w"], p["b"], groups=2, **settings)
        return x

    (layer,) = is_the_gradient(model, {"w": normal(4, 2, 2, 2), "b": normal(4)}, normal(2, 4, 8, 9))
    assert layer.uses == 3


def test_only_the_parameter_itself_is_watched():
    """Neither an equal tensor nor a parameter's copy: those are other uses."""
    params, other = {"w": normal(4, 4), "v": normal(4, 4)}, normal(4, 4)
    model = lambda p, x: F.linear(F.linear(F.linear(x, other), p["w"]), p["v"].clone())  # noqa: E731
    layers = is_the_gradient(model, params, ROWS)
    assert [layer.name for layer in layers] == ["w"]


@pytest.mark.parametrize(("length", "saw"), [(4, 4), (2, 2)])
def test_number_of_uses_is_checked(length, saw):
    params = {"w": normal(4, 4), "b": normal(4)}
    layers = find_layers(recurrent, params, normal(2, 3, 4))
    with pytest.raises(ValueError, match=f"layer 'w': expected 3 uses of 'w', saw {saw}.*describe the layers again"):
        captured(recurrent, params, normal(2, length, 4), cotangent, layers)


def test_one_tensor_at_two_places_is_two_parameters():
    """Two weights may start as the same zeros."""
    w = normal(4, 4)
    model = lambda p, x: F.linear(F.linear(x, p["first"]).tanh(), p["last"])  # noqa: E731
    assert len(is_the_gradient(model, {"first": w, "last": w}, ROWS)) == 2


def test_shapes_cost_nothing_and_probes_no_memory():
    """Outputs of 2^40 numbers, which no machine holds."""
    x, params = torch.zeros(()).expand(2**30, 2**10), {"w": torch.zeros(()).expand(2**10, 2**10)}
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    specs = output_specs(model, find_layers(model, params, x), params, x)
    (probe,) = zero_probes(specs)["w"]
    assert probe.shape == (2**30, 2**10) and probe.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_outputs_are_kept(dtype):
    net = activations().to(dtype)
    outputs, received, gradients = captured(
        of_module(net), dict(net.named_parameters()), ROWS.to(dtype), torch.ones_like
    )
    assert torch.equal(outputs, net(ROWS.to(dtype))) and outputs.dtype == dtype
    assert {x.dtype for x in optree.tree_leaves((received, gradients))} == {dtype}


@each_case
def test_under_vmap_the_same_as_alone(case):
    """Over an ensemble of parameters, and over batches."""
    layers = find_layers(case.model, case.params, case.inputs)
    run = lambda params, x: captured(case.model, params, x, torch.ones_like, layers)  # noqa: E731
    params = {name: torch.stack([p, p + 0.1]) for name, p in case.params.items()}
    inputs = torch.stack([case.inputs, case.inputs.flip(0)])
    for dims in ((0, None), (0, 0)):
        x = inputs if dims[1] == 0 else case.inputs
        found = optree.tree_map(lambda leaf: leaf[1], vmap(run, dims)(params, x))
        alone = run({name: p[1] for name, p in params.items()}, x if dims[1] is None else x[1])
        optree.tree_map(close, found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("case", [cases.SEQUENCE[0], cases.CONVOLUTION[3]], ids=lambda case: case.name)
def test_compiled_the_same_as_eager(case):
    layers = find_layers(case.model, case.params, case.inputs)
    run = lambda params, x: captured(case.model, params, x, torch.ones_like, layers)  # noqa: E731
    compiled = traced(run)
    optree.tree_map(close, compiled(case.params, case.inputs), run(case.params, case.inputs))
