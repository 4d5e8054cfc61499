"""``trace`` equals the plain loop."""

import pytest

from lrkfac import trace
from tests import reference_optimizers
from tests.transforms.test_base import close, flat, replayed, steps

each_nesterov = pytest.mark.parametrize("nesterov", [False, True])


@each_nesterov
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_equals_the_reference(decay, nesterov):
    grads = steps(5)
    expected = reference_optimizers.momentum_trace([flat(g) for g in grads], decay, nesterov)
    for found, one in zip(replayed(trace(decay, nesterov), grads), expected, strict=True):
        close(found, one)
