"""``clip_by_kl`` bounds the step that the chain takes, so that it must know the chain's rate."""

import pytest
import torch

import lrkfac


def evaluated():
    params = {"w": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    x, y = torch.eye(4, dtype=torch.float64), torch.arange(4) % 3
    model = lambda params, x: x @ params["w"].T  # noqa: E731
    layers = lrkfac.find_layers(model, params, x)
    return params, layers, lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, x, y)


@pytest.mark.parametrize("rate", [1.0, 0.1, 1e-3])
def test_a_clipped_step_has_the_bound_as_its_length_at_every_rate(rate):
    """In the metric of the Fisher matrix that preconditions: ``δᵀ∇L · rate = kl_clip``."""
    params, layers, e = evaluated()
    tx = lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, lrkfac.structures.full(), damping=1e-8, decay=0.0),
        lrkfac.clip_by_kl(1e-9, rate),
        lrkfac.scale_by_learning_rate(rate),
    )
    updates, _ = tx.update(e.grads, tx.init(params), params, evaluation=e)
    assert float(e.quadratic(updates, updates)) == pytest.approx(1e-9, rel=1e-4)


def test_the_rate_is_required():
    with pytest.raises(TypeError, match=r"clip_by_kl.* 'learning_rate'"):
        lrkfac.clip_by_kl(1e-3)
