"""``scale_by_adam`` equals the plain loop, and torch's Adam."""

import pytest
import torch

from lrkfac import apply_updates, chain, scale_by_adam, scale_by_learning_rate
from lrkfac.testing import check_transformation
from tests import reference_optimizers
from tests.transforms.test_base import close, flat, nested, replayed, steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_laws(dtype):
    check_transformation(scale_by_adam(), nested(dtype))


@pytest.mark.parametrize("options", [{}, {"b1": 0.0, "b2": 0.5}, {"b1": 0.5, "b2": 0.0, "eps": 0.1}])
def test_equals_the_reference(options):
    grads = steps(6)
    expected = reference_optimizers.adam([flat(g) for g in grads], **options)
    for found, one in zip(replayed(scale_by_adam(**options), grads), expected, strict=True):
        close(found, one)


def test_equals_torch():
    params = {"w": torch.randn(3, 2).double(), "b": torch.randn(4).double()}
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    torchs = torch.optim.Adam(leaves.values(), 0.1, (0.8, 0.99), 1e-6)
    tx = chain(scale_by_adam(0.8, 0.99, 1e-6), scale_by_learning_rate(0.1))
    state = tx.init(params)
    for _ in range(5):
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        torchs.step()
        updates, state = tx.update(grads, state, params)
        params = apply_updates(params, updates)
    close(params, {name: leaf.detach() for name, leaf in leaves.items()}, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradients_give_zero_updates(dtype):
    zeros = {"w": torch.zeros(3, 2, dtype=dtype)}
    for found in replayed(scale_by_adam(), [zeros] * 3):
        close(found, zeros, rtol=0)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"b1": 1.0}, "b1: .* got 1.0"),
        ({"b2": -0.1}, "b2: .* got -0.1"),
        ({"eps": float("nan")}, "eps: .* got nan"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        scale_by_adam(**options)


def test_another_tree_is_refused():
    tx = scale_by_adam()
    with pytest.raises(ValueError, match=r"scale_by_adam: updates: expected 'w' of shape \(3, 2\), got \(2, 3\)"):
        tx.update({**nested(), "w": nested()["w"].mT}, tx.init(nested()))
