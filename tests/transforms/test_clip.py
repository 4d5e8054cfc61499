"""Clipping equals the formulas, changes nothing within the bound, and zeros stay zeros."""

import math

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import Evaluation, clip, clip_by_global_norm, clip_by_kl
from lrkfac.testing import seeds
from tests import cases
from tests import reference_optimizers as reference
from tests.transforms.test_base import close, flat, nested, replayed
from tests.transforms.test_precondition import layers_and_evaluate

zero_or_one = st.sampled_from([0.0, 1.0])
bounds = st.floats(-4, 4).map(lambda x: 10**x)


def norm(tree):
    return math.sqrt(sum(leaf.double().square().sum().item() for leaf in optree.tree_leaves(tree)))


@given(bounds, seeds, st.booleans())
def test_value_bounds_each_entry(max_delta, seed, tensor):
    grads = nested(seed=seed)
    bound = torch.tensor(max_delta, dtype=torch.float64) if tensor else max_delta
    found, _ = clip(bound).update(grads, ())
    bounded = lambda g: [max(-max_delta, min(x, max_delta)) for x in g.flatten().tolist()]  # noqa: E731
    expected = {k: torch.tensor(bounded(g), dtype=g.dtype).reshape(g.shape) for k, g in flat(grads).items()}
    close(found, expected, rtol=0)
    assert all(u.abs().amax() <= max_delta for u in flat(found).values() if u.numel())


@given(bounds, seeds, zero_or_one)
def test_global_norm_equals_the_reference(max_norm, seed, size):
    grads = optree.tree_map(lambda g: size * g, nested(seed=seed))
    found, _ = clip_by_global_norm(max_norm).update(grads, ())
    close(found, reference.clipped_by_global_norm(flat(grads), max_norm))
    assert norm(found) <= max_norm * (1 + 1e-12)
    if norm(grads) <= max_norm:
        close(found, grads, rtol=1e-15)


@given(bounds, st.floats(0.01, 10), seeds, zero_or_one)
def test_kl_equals_the_reference(kl_clip, rate, seed, size):
    """Also where ``u · g`` is negative, as it is for one seed in two."""
    grads, updates = nested(seed=seed), optree.tree_map(lambda g: size * g, nested(seed=seed + 1))
    evaluation = Evaluation(*[None] * len(Evaluation._fields))._replace(grads=grads)
    (found,) = replayed(clip_by_kl(kl_clip, rate), [updates], evaluation=evaluation)
    close(found, reference.clipped_by_kl(flat(updates), flat(grads), rate, kl_clip))


@pytest.mark.parametrize("rate", [1.0, 0.1, 1e-3])
def test_a_step_clipped_by_kl_has_the_bound_as_its_length_at_every_rate(rate):
    """In the metric of the Fisher matrix that preconditions: ``δᵀ∇L · rate = kl_clip``."""
    case = cases.EXACT[0]
    layers, evaluate = layers_and_evaluate(case)
    tx = lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, lrkfac.structures.full(), damping=1e-8, decay=0.0),
        clip_by_kl(1e-9, rate),
        lrkfac.scale_by_learning_rate(rate),
    )
    e = evaluate(case.params)
    updates, _ = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    assert float(e.quadratic(updates, updates)) == pytest.approx(1e-9, rel=1e-4)


@given(bounds, seeds, st.booleans())
def test_kl_keeps_its_last_factor_also_of_an_ensemble(kl_clip, seed, tree):
    """``factor * u`` is the update: 1 where the clip is inactive, and of any rate."""
    grads = nested(seed=seed)
    rate = optree.tree_map(lambda g: 0.1, grads) if tree else 0.1
    evaluation, tx = Evaluation(*[None] * len(Evaluation._fields))._replace(grads=grads), clip_by_kl(kl_clip, rate)
    start = tx.init(grads)
    found, state = tx.update(grads, start, grads, evaluation=evaluation)
    assert start.factor == 1 and start.factor.dtype == state.factor.dtype and not state.factor.requires_grad
    squared_length = 0.1**2 * norm(grads) ** 2
    assert float(state.factor) == pytest.approx(min(1, math.sqrt(kl_clip / squared_length)), rel=1e-6)
    close(found, optree.tree_map(lambda g: state.factor * g, grads))

    both = optree.tree_map(lambda g: torch.stack([g, 1e3 * g]), grads)
    step = lambda g: tx.update(g, tx.init(g), g, evaluation=evaluation._replace(grads=g))[1].factor  # noqa: E731
    expected = torch.stack([step(optree.tree_map(lambda g, i=i: g[i], both)) for i in (0, 1)])
    torch.testing.assert_close(torch.func.vmap(step)(both), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """The sum of many small squares, which bfloat16 would lose, and of squares that overflow in float16."""
    grads = {"w": torch.full((100, 100), 0.01, dtype=dtype), "b": torch.ones(1, dtype=dtype)}
    (found,) = replayed(clip_by_global_norm(0.1), [grads])
    assert found["w"].dtype == dtype
    assert norm(found) == pytest.approx(0.1, rel=0.01)
    large = {"w": torch.full((4,), 300.0, dtype=torch.float16)}
    assert norm(replayed(clip_by_global_norm(1.0), [large])[0]) == pytest.approx(1.0, rel=0.01)
