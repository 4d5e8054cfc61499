"""``scale_by_adam`` equals torch's Adam."""

import pytest
import torch

from lrkfac import apply_updates, chain, scale_by_adam, scale_by_learning_rate
from tests.transforms.test_base import close, replayed


@pytest.mark.parametrize("b1, b2, eps", [(0.9, 0.999, 1e-8), (0.0, 0.5, 1e-6), (0.5, 0.0, 0.1)])
def test_equals_torch(b1, b2, eps):
    params = {"w": torch.randn(3, 2).double(), "b": torch.randn(4).double()}
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torchs = torch.optim.Adam(leaves.values(), 0.1, (b1, b2), eps)
    tx = chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(0.1))
    state = tx.init(params)
    for _ in range(5):
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        torchs.step()
        updates, state = tx.update(grads, state, params)
        params = apply_updates(params, updates)
    close(params, {name: leaf.detach() for name, leaf in leaves.items()}, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zero_gradients_give_zero_updates(dtype):
    zeros = {"w": torch.zeros(3, 2, dtype=dtype)}
    for found in replayed(scale_by_adam(), [zeros] * 3):
        close(found, zeros, rtol=0)
