"""Schedules equal their formulas at every step, and are counted from 0."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac import scale, scale_by_learning_rate
from lrkfac.schedules import (
    constant_schedule,
    exponential_decay,
    join_schedules,
    piecewise_constant_schedule,
    warmup_cosine_decay_schedule,
)
from lrkfac.testing import check_transformation
from tests import reference_optimizers as reference
from tests.transforms.test_base import close, flat, nested, replayed, steps

values = st.floats(-10, 10)


def check_schedule(schedule, expected, number=25):
    for step in range(number):
        updates = torch.as_tensor(schedule(torch.tensor(step)), dtype=torch.float64)
        assert updates.shape == ()
        torch.testing.assert_close(updates.item(), float(expected(step)), rtol=1e-12, atol=1e-12)


@given(values, st.integers(0, 10), st.integers(1, 12), values, values)
def test_warmup_cosine(peak, warmup, more, initial, final):
    schedule, steps = warmup_cosine_decay_schedule(initial, peak, warmup, warmup + more, final), (warmup, warmup + more)
    check_schedule(schedule, lambda i: reference.warmup_cosine_decay_schedule(i, peak, *steps, initial, final))
    assert schedule(torch.tensor(warmup)).item() == pytest.approx(peak)
    assert schedule(torch.tensor(10**6)).item() == pytest.approx(final)


@given(values, st.floats(0.1, 2), st.integers(1, 10))
def test_exponential(initial, rate, interval):
    schedule = exponential_decay(initial, interval, rate)
    check_schedule(schedule, lambda step: reference.exponential_decay(step, initial, rate, interval))


@given(values, st.dictionaries(st.integers(0, 20), st.floats(-2, 2), max_size=4))
def test_piecewise_constant(initial, scales):
    boundaries, levels = sorted(scales), [initial]
    for boundary in boundaries:
        levels.append(levels[-1] * scales[boundary])
    schedule = piecewise_constant_schedule(initial, scales)
    check_schedule(schedule, lambda step: reference.piecewise_constant_schedule(step, boundaries, levels))


@given(st.lists(st.integers(1, 8), max_size=3), st.data())
def test_joined(lengths, data):
    """Each of them counts from its own start."""
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rates = data.draw(st.lists(st.floats(0.5, 1.5), min_size=len(starts), max_size=len(starts)))
    schedules = [exponential_decay(1.0 + i, 1, rate) for i, rate in enumerate(rates)]
    if lengths:
        schedules[-1], rates[-1] = constant_schedule(float(len(lengths) + 1)), 1.0

    def expected(step):
        i = max(i for i, start in enumerate(starts) if start <= step)
        return reference.exponential_decay(step - starts[i], 1.0 + i, rates[i])

    check_schedule(join_schedules(schedules, starts[1:]), expected)
    whole = join_schedules([join_schedules(schedules, starts[1:]), lambda step: 7], [30])
    check_schedule(whole, lambda step: expected(step) if step < 30 else 7, number=35)


SCHEDULES = {
    "joined": (
        join_schedules([exponential_decay(0.5, 1, 0.8), constant_schedule(0.1)], [3]),
        lambda step: 0.5 * 0.8**step if step < 3 else 0.1,
    ),
    "the user's own": (lambda step: 1 / (1 + step), lambda step: 1 / (1 + step)),
    "a number": (0.25, lambda step: 0.25),
    "a tensor": (torch.tensor(0.25), lambda step: 0.25),
}


@pytest.mark.parametrize("rate, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rate_of_each_step(rate, expected):
    for dtype in (torch.float64, torch.bfloat16):
        check_transformation(scale_by_learning_rate(rate), nested(dtype))
    grads = steps(6)
    for i, updates in enumerate(replayed(scale_by_learning_rate(rate), grads)):
        # one divided by an integer tensor is float32
        close(updates, {k: -expected(i) * g for k, g in flat(grads[i]).items()}, rtol=1e-7)


@pytest.mark.parametrize("factor", [2, -0.5, 0.0, torch.tensor(0.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale(factor, dtype):
    check_transformation(scale(factor), nested(dtype))
    for updates, grads in zip(replayed(scale(factor), steps(2, dtype)), steps(2, dtype), strict=True):
        close(updates, {k: float(factor) * g for k, g in flat(grads).items()}, rtol=0)


def test_boundaries_rise():
    """Bad values of single arguments: ``tests/test_public_calls.py``."""
    with pytest.raises(ValueError, match=r"boundaries: .*\(2, inf\), got 2"):
        join_schedules([abs] * 3, [2, 2])
