"""The protocol, ``chain`` and ``apply_updates``; and what the tests of the other transformations share."""

from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac import GradientTransformation, apply_updates, chain, identity
from lrkfac.core.base.arguments import check_number
from lrkfac.testing import gradients


class Pair(NamedTuple):
    scale: torch.Tensor
    shift: torch.Tensor


class Step(NamedTuple):
    """The evaluation, the updates and the state of a step, and the parameters that it leads to."""

    evaluation: lrkfac.Evaluation
    updates: Any
    state: Any
    params: Any


def nested(dtype=torch.float64, seed=0):
    """Parameters in a dictionary, a list, a tuple and a NamedTuple; a scalar and an empty one among them."""
    shapes = {"w": (3, 2), "blocks": [(4,), ((2, 1, 2), Pair((), (5,)))], "a": (0, 3), "one": ((1, 1),)}
    empty = optree.tree_map(lambda s: torch.empty(s, dtype=dtype), shapes, is_leaf=_is_shape)
    return gradients(empty, seed)


def _is_shape(x):
    return type(x) is tuple and all(isinstance(n, int) for n in x)


def flat(tree):
    return dict(enumerate(optree.tree_leaves(tree)))


def close(found, expected, rtol=1e-12, atol=None):
    """A tree equals another one, or a reference's flat dictionary, leaf by leaf."""
    expected = optree.tree_leaves(expected)
    for a, b in zip(optree.tree_leaves(found), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol if atol is None else atol)


def replayed(tx, grads, params=None, **extra):
    """The updates of each step from one gradient after another, at fixed parameters."""
    state, found = tx.init(params if params is not None else grads[0]), []
    for g in grads:
        updates, state = tx.update(g, state, params, **extra)
        found.append(updates)
    return found


def steps(number=4, dtype=torch.float64):
    return [nested(dtype, seed=10 + i) for i in range(number)]


def trained(tx, params, evaluate, number=3, every=2):
    """Steps of a transformation, each from the parameters of the one before; statistics at every ``every``-th."""
    state, found = tx.init(params), []
    for i in range(number):
        e = evaluate(params, statistics=i % every == 0)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = apply_updates(params, updates)
        found.append(Step(e, updates, state, params))
    return found


SEVERAL = (lrkfac.trace(0.9), lrkfac.add_decayed_weights(0.1), lrkfac.scale_by_adam(), lrkfac.scale(-0.1))


def test_chain_equals_replay_by_hand():
    params, hand = nested(), [t.init(nested()) for t in SEVERAL]
    tx = chain(chain(*SEVERAL[:2]), chain(*SEVERAL[2:]))
    state = tx.init(params)
    for grads in steps():
        updates, state = tx.update(grads, state, params)
        expected = grads
        for i, t in enumerate(SEVERAL):
            expected, hand[i] = t.update(expected, hand[i], params)
        assert optree.tree_all(optree.tree_map(torch.equal, updates, expected))
        params = apply_updates(params, updates)
    assert optree.tree_all(optree.tree_map(torch.equal, (*state[0], *state[1]), tuple(hand)))


def test_chain_hands_params_and_extras_to_each():
    grads = nested()
    assert identity().update(grads, identity().init(grads)) == chain().update(grads, ()) == (grads, ())
    seen = []

    def update(updates, state, params=None, *, extra, **others):
        seen.append((params, extra, others))
        return updates, state

    spy = GradientTransformation(lambda params: (), update)
    chain(spy, identity(), spy).update(grads, ((), (), ()), 2, extra=3, other=4)
    assert seen == [(2, 3, {"other": 4})] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_updates", [torch.float64, torch.bfloat16])
def test_apply_updates_adds_in_the_dtype_of_the_parameters(dtype, of_updates):
    params, updates = nested(dtype), nested(of_updates, seed=1)
    before = optree.tree_map(torch.clone, params)
    found = apply_updates(params, updates)
    assert optree.tree_structure(found) == optree.tree_structure(params)
    for new, p, u, old in zip(*map(optree.tree_leaves, (found, params, updates, before)), strict=True):
        assert new.dtype == dtype and torch.equal(p, old)
        wider = torch.promote_types(dtype, of_updates)
        assert torch.equal(new, (p.double() + u.double()).to(wider).to(dtype))


def test_check_number():
    """Values of no range or kind: ``tests/test_public_calls.py``."""
    for value in (0, 1, torch.tensor(1.0)):
        check_number(value, "name", 0)
    vmap(lambda x: check_number(x, "name", 0) or x)(torch.tensor([-1.0]))  # into which nobody can look
    for value in (-1.0, 1, torch.tensor(1.0), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="name: expected a"):
            check_number(value, "name", 0, 1)
