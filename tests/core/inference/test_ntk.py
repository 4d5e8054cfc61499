"""The neural tangent kernel is the product of Jacobians, by rows and by products, of all layers and of none."""

import pytest
import torch
from torch import nn

import lrkfac
from lrkfac.core.base.flat import flattened, unflattened
from lrkfac.curvature import ntk
from tests import cases
from tests.tensors import close, normal


def reference(model, params, x1, x2):
    def outputs(flat, x):
        return model(unflattened(flat, params), x)

    start = flattened(params)
    j1, j2 = (torch.func.jacrev(outputs)(start, x) for x in (x1, x2))
    return torch.tensordot(j1, j2, dims=([j1.ndim - 1], [j2.ndim - 1]))


def networks():
    for case in cases.LINEAR:
        if case.name in ("tanh_categorical", "scalar_output", "uncovered_shift"):
            yield case.name, case.model, case.params, case.inputs
    torch.manual_seed(0)
    nets = {
        "sequence": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3, 3)),
        "grouped convolution": (
            nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)),
            (5, 2, 3, 3),
        ),
        "dependent": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (5, 3)),
    }
    for name, (net, shape) in nets.items():
        yield (name, *lrkfac.from_module(net.double(), buffers=False), normal(*shape))


NETWORKS = list(networks())


@pytest.mark.parametrize(("name", "model", "params", "x"), NETWORKS, ids=[n for n, *_ in NETWORKS])
def test_kernels_are_products_of_jacobians(name, model, params, x):
    layers = lrkfac.find_layers(model, params, x)
    expected = reference(model, params, x, x[:3])
    close(ntk(model, layers)(params, x, x[:3]), expected)
    close(ntk(model, chunk=4)(params, x, x[:3]), expected)
    close(ntk(model, layers)(params, x), reference(model, params, x, x))


def test_rows_need_one_backward_pass_for_each_output():
    """And no gradient of single examples: the number of operations tells."""
    from torch.utils.flop_counter import FlopCounterMode

    params = {"w": torch.randn(64, 64), "v": torch.randn(1, 64)}

    def model(params, x):
        return torch.tanh(x @ params["w"].mT) @ params["v"].mT

    x = torch.randn(32, 64)
    layers = lrkfac.find_layers(model, params, x)
    counts = []
    for kernel in (ntk(model, layers), ntk(model)):
        with FlopCounterMode(display=False) as counter:
            kernel(params, x)
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1] / 10


def test_other_outputs_than_one_tensor_are_refused():
    with pytest.raises(TypeError, match="model: expected outputs as one floating-point tensor"):
        ntk(lambda params, x: (x @ params["w"],))({"w": torch.ones(2, 2)}, torch.ones(3, 2))
