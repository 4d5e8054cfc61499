"""``LowRankKFAC`` hands options of ``find_layers`` on: it steps as the functional loop with the same layers."""

import copy

import pytest
import torch
from torch import nn

import lrkfac

DOUBLE = torch.float64
LIKELIHOOD = lrkfac.categorical()


def windows(x, w):
    """``s = Σ_j w_j x_{t + j}`` at each ``t``."""
    return x.unfold(1, len(w), 1) @ w


KIND = lrkfac.LayerKind("window", windows, lambda x, w: x.unfold(1, w.shape[1], 1) @ w.mT, weight_axis=None)


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.window, self.head = nn.Parameter(torch.randn(3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(KIND(x, self.window).tanh())


class Normalised(nn.Module):
    """No operation covers the weight."""

    def __init__(self):
        super().__init__()
        self.v, self.head = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x @ (self.v / self.v.norm(dim=1, keepdim=True)).mT)


class Scaled(nn.Module):
    """Of the inputs one is not by example, although it is as long as a batch of the others may be; with buffers."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.head(self.norm(x) * mask.mean())


X, Y = torch.randn(8, 6, dtype=DOUBLE), torch.arange(8) % 3
CASES = {
    "kinds": (Windowed, X, {"kinds": [KIND]}),
    "uncovered": (Normalised, X, {"uncovered": "jacobian"}),
    "batch_axes": (Scaled, (X, torch.rand(8, dtype=DOUBLE)), {"batch_axes": (0, None)}),
}


@pytest.mark.parametrize(("network", "inputs", "finding"), CASES.values(), ids=CASES)
def test_steps_are_those_of_the_functional_loop(network, inputs, finding):
    torch.manual_seed(0)
    net = network().double()
    has_buffers = any(True for _ in net.buffers())
    model, params, *buffers = lrkfac.from_module(copy.deepcopy(net), buffers=has_buffers)
    options = dict(finding)
    if has_buffers:
        options["batch_axes"] = (None, finding["batch_axes"])
    with_buffers = lambda: (*buffers, inputs) if has_buffers else inputs  # noqa: E731
    layers = lrkfac.find_layers(model, params, with_buffers(), **options)
    evaluate = lrkfac.evaluator(model, LIKELIHOOD, layers, "exact", has_aux=has_buffers, thin=True)
    tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2)
    state = tx.init(params)
    optimizer = lrkfac.LowRankKFAC(net, LIKELIHOOD, inputs, 0.1, estimator="exact", rank=2, **finding)
    assert optimizer.layers == layers
    assert optimizer.layers != lrkfac.find_layers(model, params, with_buffers())
    for step in range(3):
        evaluation = evaluate(params, with_buffers(), Y, statistics=step == 0)
        buffers = [evaluation.aux] if has_buffers else []
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
        optimizer.step(inputs, Y)
        for name, p in net.named_parameters():
            assert torch.equal(p, params[name]), (step, name)


def test_a_kind_must_be_passed_to_be_covered():
    net = Windowed().double()
    [(parameter, reason)] = lrkfac.LowRankKFAC(net, LIKELIHOOD, X, 0.1).layers.uncovered
    assert parameter.path == "window" and "kinds=[...]" in reason
