"""Transformations and what they are made of copy, pickle and are saved; updates never share memory with the state."""

import copy
import dataclasses
import io
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import optree
import pytest
import torch

import lrkfac
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal, unit_wise
from tests import cases
from tests.transforms.test_base import close, trained
from tests.transforms.test_precondition import layers_and_evaluate

CASE = cases.LINEAR[0]
LAYERS, EVALUATE = layers_and_evaluate(CASE)


def mask(params):
    return optree.tree_map(lambda x: x.ndim == 2, params)


SCHEDULE = lrkfac.schedules.join_schedules(
    [lrkfac.schedules.exponential_decay(0.1, 2, 0.5), lrkfac.schedules.constant_schedule(0.01)], [3]
)
STRUCTURES = {
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(2)),
    "dense, corrected": kronecker(dense(), dense(), corrected=True),
    "diagonal": kronecker(diagonal(), low_rank_plus_diagonal(2)),
    "per unit": unit_wise(),
    "per layer": layer_wise(),
    "whole": full(),
}
ELEMENTWISE = {
    "identity": lrkfac.identity(),
    "scale": lrkfac.scale(0.1),
    "scale_by_learning_rate": lrkfac.scale_by_learning_rate(0.1),
    "scale_by_learning_rate, scheduled": lrkfac.scale_by_learning_rate(SCHEDULE),
    "clip": lrkfac.clip(1e-3),
    "clip_by_global_norm": lrkfac.clip_by_global_norm(1e-3),
    "clip_by_kl": lrkfac.clip_by_kl(1e-3, SCHEDULE),
    "add_decayed_weights": lrkfac.add_decayed_weights(0.1),
    "trace": lrkfac.trace(0.9),
    "trace, nesterov": lrkfac.trace(0.9, nesterov=True),
    "scale_by_adam": lrkfac.scale_by_adam(),
    "ema_params": lrkfac.ema_params(),
    "masked": lrkfac.masked(lrkfac.trace(0.9), mask),
    "partition": lrkfac.partition({True: lrkfac.trace(0.9), False: lrkfac.scale_by_adam()}, mask),
    "apply_if_finite": lrkfac.apply_if_finite(lrkfac.trace(0.9), 3),
    "accumulate": lrkfac.accumulate(lrkfac.trace(0.9), 2),
}


def of_layers(layers):
    return {
        "inject_hyperparams": lrkfac.inject_hyperparams(lrkfac.low_rank_kfac)(
            layers, learning_rate=SCHEDULE, damping=0.1
        ),
        "kfac": lrkfac.kfac(layers, 0.1),
        "low_rank_kfac": lrkfac.low_rank_kfac(layers, SCHEDULE, rank=2, weight_decay=0.1),
        "adaptive_low_rank_kfac": lrkfac.adaptive_low_rank_kfac(layers, rank=2),
        "adaptive, bounded": lrkfac.adaptive_low_rank_kfac(layers, weight_decay=0.1, kl_clip=1e-3, gradient_decay=0.5),
        **{
            name: lrkfac.chain(lrkfac.precondition_by_fisher(layers, structure), lrkfac.scale(-0.1))
            for name, structure in STRUCTURES.items()
        },
    }


TRANSFORMATIONS = ELEMENTWISE | of_layers(LAYERS)
each = pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=list(TRANSFORMATIONS))


def evaluation_for(tx, params, statistics=True):
    return EVALUATE(params, statistics=statistics and "Accumulate" not in repr(tx))


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each
def test_copies_do_the_same_bit_for_bit_and_updates_changed_in_place_leave_states_unchanged(tx):
    steps = lambda tx: trained(tx, CASE.params, partial(evaluation_for, tx))  # noqa: E731
    expected = [step[1:] for step in steps(tx)]
    for way in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved):
        close([step[1:] for step in steps(way(tx))], expected, rtol=0, atol=0)
    for updates, state, _ in expected:
        before = optree.tree_map(torch.clone, state)
        for leaf in optree.tree_leaves(lrkfac.materialize(updates)):
            leaf.mul_(7.0).add_(1.0)
        close(state, before, rtol=0, atol=0)


def test_lazy_updates_of_momentum_materialize_into_memory_of_their_own():
    tx, rows = lrkfac.trace(0.9), (torch.randn(3, 4), torch.randn(3, 5))
    updates = {"w": lrkfac.LazyMatrix(*rows, torch.float32)}
    lazy, state = tx.update(updates, tx.init({"w": torch.zeros(4, 5)}))
    before = state.trace["w"].clone()
    lrkfac.materialize(lazy)["w"].zero_()
    assert isinstance(lazy["w"], lrkfac.LazyMatrix) and torch.equal(state.trace["w"], before)


@pytest.mark.parametrize("make", [lrkfac.low_rank_kfac, lrkfac.kfac])
def test_hyperparameters_in_the_state_reach_the_transformation_without_a_call_of_its_factory(make):
    """The same numbers as of a transformation made with them; the factory runs when it is injected, and never again."""
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return make(*args, **options)

    values = OF_KFAC
    tx = lrkfac.inject_hyperparams(counted)(LAYERS, **{name: 0.9 * value for name, value in values.items()})
    state, e = tx.init(CASE.params), EVALUATE(CASE.params)
    made = len(calls)
    state = state._replace(hyperparameters={name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()})
    plain = make(LAYERS, **values)
    expected, expected_state = plain.update(e.grads, plain.init(CASE.params), CASE.params, evaluation=e)
    for _ in range(2):
        updates, state = tx.update(e.grads, state, CASE.params, evaluation=e)
        close(updates, expected, rtol=1e-12)
        expected, expected_state = plain.update(e.grads, expected_state, CASE.params, evaluation=e)
    assert len(calls) == made


class Pair(NamedTuple):
    factor: Any
    other: float = 1.0


@dataclasses.dataclass(frozen=True)
class Product:
    """Multiplies by a factor that stands in some object."""

    holder: Any

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, **extra):
        return updates * self.holder.factor, state


def product(holder):
    return lrkfac.GradientTransformation((link := Product(holder)).init, link.update)


def closed(rate):
    return lrkfac.GradientTransformation(lambda params: (), lambda u, s, params=None, **extra: (u * rate, s))


@pytest.mark.parametrize(
    "second, square",
    [
        (lambda rate: lrkfac.scale(rate / 2), 8.0),
        (lambda rate: lrkfac.scale(torch.stack([torch.as_tensor(rate)] * 2).sum()), 32.0),
        (lambda rate: lrkfac.scale(torch.neg(input=torch.as_tensor(rate))), -16.0),
        (lambda rate: lrkfac.scale(float(rate)), 16.0),
        (lambda rate: lrkfac.scale(torch.tensor(rate)), 16.0),
        (lambda rate: lrkfac.scale(float(f"{rate:.3f}")), 16.0),
        (lambda rate: lrkfac.scale(copy.deepcopy(rate)), 16.0),
        (closed, 16.0),
        (lambda rate: product(Pair(rate)), 16.0),
        (lambda rate: product(SimpleNamespace(factor=rate)), 16.0),
        (lambda rate: lrkfac.scale_by_learning_rate(lambda step: rate), -16.0),
        (lambda rate: lrkfac.scale_by_learning_rate(partial(lambda rate, step: rate, rate)), -16.0),
    ],
)
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_a_new_value_reaches_all_that_a_factory_makes_of_it(second, square):
    """Also a derived value, a closure, or an object that cannot be looked into: there the factory is called again."""
    tx = lrkfac.inject_hyperparams(lambda rate: lrkfac.chain(lrkfac.scale(rate), second(rate)))(rate=1.0)
    state = tx.init(torch.zeros(1))._replace(hyperparameters={"rate": torch.tensor(4.0)})
    assert tx.update(torch.ones(1), state)[0] == square


OF_KFAC = {"learning_rate": 0.2, "damping": 0.3, "decay": 0.5, "momentum": 0.7, "weight_decay": 0.1, "kl_clip": 0.01}


@pytest.mark.parametrize(
    "make, values",
    [
        (partial(lrkfac.low_rank_kfac, LAYERS), OF_KFAC),
        (partial(lrkfac.adaptive_low_rank_kfac, LAYERS), {"weight_decay": 0.1, "kl_clip": 1.0}),
        (lrkfac.scale_by_adam, {"b1": 0.9, "b2": 0.99, "eps": 1e-8}),
        (lrkfac.ema_params, {"decay": 0.9}),
        (lrkfac.clip, {"max_delta": 1.0}),
        (lrkfac.clip_by_global_norm, {"max_norm": 1.0}),
    ],
    ids=["low_rank_kfac", "adaptive", "adam", "average", "clip", "norm"],
)
def test_a_new_value_is_checked_like_the_first(make, values):
    e = EVALUATE(CASE.params)
    tx = lrkfac.inject_hyperparams(make)(**values)
    state = tx.init(CASE.params)
    for name in values:
        bad = state._replace(hyperparameters={**state.hyperparameters, name: torch.tensor(-1.0)})
        with pytest.raises(ValueError, match=r"expected a finite number in .* got -1"):
            tx.update(e.grads, bad, CASE.params, evaluation=e)
