"""``trace``, ``scale_by_adam`` and ``ema_params`` equal the plain loop, torch's Adam and the published schedule."""

import math

import pytest
import torch

import lrkfac
from lrkfac import apply_updates, chain, scale_by_adam, scale_by_learning_rate, trace
from tests import reference_optimizers
from tests.transforms.test_base import close, flat, replayed, steps


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_trace_equals_the_reference(decay, nesterov):
    grads = steps(5)
    expected = reference_optimizers.momentum_trace([flat(g) for g in grads], decay, nesterov)
    close(replayed(trace(decay, nesterov), grads), expected)


@pytest.mark.parametrize("b1, b2, eps", [(0.9, 0.999, 1e-8), (0.0, 0.5, 1e-6), (0.5, 0.0, 0.1)])
def test_adam_equals_torch(b1, b2, eps):
    """Zero gradients give zero updates."""
    params = {name: torch.randn(n).double() for name, n in (("w", 6), ("b", 4), ("still", 2))}
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torchs = torch.optim.Adam(leaves.values(), 0.1, (b1, b2), eps)
    tx = chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(0.1))
    state = tx.init(params)
    for _ in range(5):
        grads = {name: torch.randn_like(p) * (name != "still") for name, p in params.items()}
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        torchs.step()
        updates, state = tx.update(grads, state, params)
        params = apply_updates(params, updates)
    close(params, {name: leaf.detach() for name, leaf in leaves.items()}, rtol=1e-10)


@pytest.mark.parametrize("decay, power", [(0.0, 8.0), (0.5, 0.0), (0.9, 0.0), (0.9, 2.0), (0.98, 8.0)])
def test_averaged_parameters_follow_the_published_schedule(decay, power):
    """At first the mean of all parameters, that of step k with the weight k (k + 1) ... (k + power - 1)."""
    tx, params, seen = lrkfac.ema_params(decay, power), {"w": torch.zeros(3).double()}, []
    state = tx.init(params)
    for t in range(1, 20):
        updates = {"w": torch.randn(3).double()}
        passed, state = tx.update(updates, state, params)
        close(passed, updates, rtol=0, atol=0)
        params = apply_updates(params, updates)
        seen.append(params["w"])
        polynomial = (t - 1) / (t + power)
        kept = min(polynomial, decay)
        average = params["w"] if t == 1 else kept * average + (1 - kept) * params["w"]
        close(state.average["w"], average, rtol=1e-6, atol=1e-6)
        if polynomial <= decay:
            weights = torch.tensor([math.prod(range(k, k + int(power))) for k in range(1, t + 1)]).double()
            close(state.average["w"], weights @ torch.stack(seen) / weights.sum(), rtol=1e-6, atol=1e-6)


def test_the_average_follows_parameters_that_converge_linearly():
    """To within twice their distance to the minimum, where a step leaves 0.992 of it; 0.99 is four times as far."""
    distances = {}
    for decay, power in ((0.98, 8.0), (0.99, 0.0)):
        tx, params = lrkfac.ema_params(decay, power), torch.ones(1).double()
        state = tx.init(params)
        for _ in range(1000):
            updates, state = tx.update(-0.008 * params, state, params)
            params = params + updates
        distances[decay] = float(state.average / params)
    assert distances[0.98] < 2 and distances[0.99] > 4
