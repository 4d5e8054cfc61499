"""``scale_by_quadratic_model(max_kl=...)``: steps are shortened along themselves, until they are short enough."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.transforms.test_quadratic_model import MLP, flat, make, model_of, row, run


@given(st.floats(-8, 2))
def test_steps_are_no_longer_than_the_bound(exponent):
    """In the metric of the batch, with the value of the model told for the step that is taken."""
    bound = 10.0**exponent
    tx, evaluate = make(MLP, damping=0.5, max_kl=bound)
    for params, old, _, updates, new in run(tx, MLP, evaluate, 4):
        matrix, slope = model_of(MLP, params, old.damping, dict.fromkeys(MLP.params, 0.0))
        fisher = matrix - old.damping * torch.eye(len(slope), dtype=matrix.dtype)
        step = flat(MLP, updates)
        assert step @ fisher @ step <= bound * (1 + 1e-9) and new.momentum.abs() <= 1
        if step.any():
            torch.testing.assert_close(new.predicted, slope @ step + step @ matrix @ step / 2, rtol=1e-8, atol=1e-14)


def test_a_wide_bound_changes_nothing():
    (tx, evaluate), (free, _) = make(MLP, max_kl=1e12), make(MLP)
    for (*_, updates, new), (*_, expected, other) in zip(
        run(tx, MLP, evaluate, 3), run(free, MLP, evaluate, 3), strict=True
    ):
        if other.momentum.abs() <= 1:
            torch.testing.assert_close(flat(MLP, updates), flat(MLP, expected))
            torch.testing.assert_close(row(MLP, new.last), row(MLP, other.last))


def test_a_step_that_is_shortened_keeps_its_direction():
    steps = []
    for bound in (None, 1e-6):
        tx, evaluate = make(MLP, max_kl=bound)
        steps.append(flat(MLP, next(run(tx, MLP, evaluate, 1))[3]))
    cosine = torch.nn.functional.cosine_similarity(*steps, dim=0)
    assert steps[1].norm() < steps[0].norm() and cosine == pytest.approx(1, abs=1e-9)
