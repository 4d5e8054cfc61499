"""``trace`` equals the plain loop."""

import pytest
import torch

from lrkfac import trace
from lrkfac.testing import check_transformation
from tests import reference_optimizers
from tests.transforms.test_base import close, flat, nested, replayed, steps

each_nesterov = pytest.mark.parametrize("nesterov", [False, True])


@each_nesterov
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_laws(nesterov, dtype):
    check_transformation(trace(0.9, nesterov), nested(dtype))


@each_nesterov
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_equals_the_reference(decay, nesterov):
    grads = steps(5)
    expected = reference_optimizers.momentum_trace([flat(g) for g in grads], decay, nesterov)
    for found, one in zip(replayed(trace(decay, nesterov), grads), expected, strict=True):
        close(found, one)


def test_no_decay_is_the_identity():
    for found, grads in zip(replayed(trace(0.0), steps()), steps(), strict=True):
        close(found, grads, rtol=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match=r"decay: expected a finite number in \[0, 1\)"):
        trace(decay)


def test_another_tree_is_refused():
    tx = trace(0.9)
    with pytest.raises(ValueError, match=r"trace: .*missing \['w'\]"):
        tx.update({k: g for k, g in nested().items() if k != "w"}, tx.init(nested()))
