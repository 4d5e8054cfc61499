"""The bound ``kl_clip`` of ``scale_by_quadratic_model``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from tests.transforms.test_quadratic_model import MLP, Plain, flat, make, model_of, row, run


@settings(max_examples=6)
@given(st.floats(-8, 2))
def test_steps_are_no_longer_than_the_bound(exponent):
    """In the metric of the batch, with the value of the model told for the step that is taken."""
    bound = 10.0**exponent
    tx, evaluate = make(MLP, damping=0.5, kl_clip=bound)
    for params, old, _, updates, new in run(tx, MLP, evaluate, 4):
        matrix, slope = model_of(MLP, params, old.damping, dict.fromkeys(MLP.params, 0.0))
        evaluate = matrix - old.damping * torch.eye(len(slope), dtype=matrix.dtype)
        step = flat(MLP, updates)
        assert step @ evaluate @ step <= bound * (1 + 1e-9) and new.momentum.abs() <= 1
        if step.any():
            torch.testing.assert_close(new.predicted, slope @ step + step @ matrix @ step / 2, rtol=1e-8, atol=1e-14)


def test_a_wide_bound_changes_nothing_and_a_narrow_one_no_direction():
    made = [make(MLP, kl_clip=bound) for bound in (None, 1e12, 1e-6)]
    free, wide, narrow = (list(run(tx, MLP, evaluate, 3)) for tx, evaluate in made)
    for (*_, expected, other), (*_, updates, new) in zip(free, wide, strict=True):
        if other.momentum.abs() <= 1:
            torch.testing.assert_close(flat(MLP, updates), flat(MLP, expected))
            torch.testing.assert_close(row(MLP, new.last), row(MLP, other.last))
    steps = [flat(MLP, path[0][3]) for path in (free, narrow)]
    cosine = torch.nn.functional.cosine_similarity(*steps, dim=0)
    assert steps[1].norm() < steps[0].norm() and cosine == pytest.approx(1, abs=1e-9)


def test_what_a_direction_was_made_of_bounds_it_where_the_batch_is_silent():
    """A sum of gradients reaches into layers of which a batch knows nothing: neither its slope nor its curvature do."""
    some, other = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    params = {"w": torch.zeros(4, 3, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    x, y, bound = torch.cat([some, -some]), 100 * torch.cat([other, -other])[:, :3], 1e-3  # of which b learns nothing
    model = lambda p, inputs: inputs[1] * (inputs[0] @ p["w"]) + p["b"]  # noqa: E731
    layers = lrkfac.find_layers(model, params, (x, x[:, :1]))
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), layers)
    plain = lrkfac.GradientTransformation(lambda params: Plain(), lambda u, state, *args, **extra: (u, state))
    tx = lrkfac.scale_by_quadratic_model(plain, damping=1e-9, kl_clip=bound, gradient_decay=0.9)
    state = tx.init(params)
    for gate, targets in ((1.0, y), (1.0, y), (0.0, 0.01 + 0 * y), (0.0, 0.01 + 0 * y)):
        e = evaluate(params, (x, torch.full_like(x[:, :1], gate)), targets, statistics=False)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        assert 0 < state.learning_rate.square() * sum(x @ x for x in state.total) <= bound * (1 + 1e-9)
        params = lrkfac.apply_updates(params, updates)
