"""``ema_params``: the mean at first, then a running average."""

import pytest
import torch

import lrkfac
from tests.transforms.test_base import close


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_it_is_the_published_schedule(decay):
    tx = lrkfac.ema_params(decay)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {"w": torch.randn(3, generator=generator, dtype=torch.float64)}  # noqa: E731
    params = draw()
    state = tx.init(params)
    average, seen = None, []
    for t in range(1, 20):
        updates = draw()
        passed, state = tx.update(updates, state, params)
        close(passed, updates, rtol=0, atol=0)
        params = lrkfac.apply_updates(params, updates)
        seen.append(params["w"])
        kept = min(1 - 1 / t, decay)
        average = params["w"] if t == 1 else kept * average + (1 - kept) * params["w"]
        close(state.average["w"], average, rtol=1e-6, atol=1e-6)
        if 1 - 1 / t <= decay:
            close(state.average["w"], torch.stack(seen).mean(0), rtol=1e-6, atol=1e-6)
