"""Transformations and what they are made of copy, pickle and are saved; updates never share memory with the state."""

import optree
import pytest
import torch

import lrkfac
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal, unit_wise
from tests import cases
from tests.transforms.test_base import close, trained
from tests.transforms.test_precondition import layers_and_evaluate
from tests.travelling import WAYS

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
    "exactly damped": kronecker(low_rank(2), low_rank_plus_diagonal(2), exact_damping=True),
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
        "adaptive_low_rank_kfac": lrkfac.adaptive_low_rank_kfac(layers, rank=2, dense_up_to=0),
        "spectral_kfac": lrkfac.spectral_kfac(layers, 0.01, rank=2, weight_decay=0.1),
        "spectral, without a rate": lrkfac.spectral_kfac(layers, rank=2, weight_decay=0.1),
        "slope and curvature": lrkfac.chain(lrkfac.trace(0.5), lrkfac.scale_by_slope_and_curvature()),
        "adaptive, bounded": lrkfac.adaptive_low_rank_kfac(layers, weight_decay=0.1, kl_clip=1e-3, gradient_decay=0.5),
        **{
            name: lrkfac.chain(lrkfac.precondition_by_fisher(layers, structure), lrkfac.scale(-0.1))
            for name, structure in STRUCTURES.items()
        },
    }


TRANSFORMATIONS = ELEMENTWISE | of_layers(LAYERS)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_copies_do_the_same_bit_for_bit_and_updates_changed_in_place_leave_states_unchanged(name):
    tx = TRANSFORMATIONS[name]
    evaluate = lambda params, statistics: EVALUATE(params, statistics=statistics and name != "accumulate")  # noqa: E731
    expected = [step[1:] for step in trained(tx, CASE.params, evaluate)]
    for way in WAYS.values():
        close([step[1:] for step in trained(way(tx), CASE.params, evaluate)], expected, rtol=0, atol=0)
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
