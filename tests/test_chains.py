"""The ready-made chains are the chains that their documentation says."""

import optree
import pytest
import torch

import lrkfac
from lrkfac import kfac, low_rank_kfac
from lrkfac.structures import kronecker, low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_transformation
from tests import cases, reference_networks, reference_optimizers
from tests.transforms.test_precondition import DENSE, layers_and_evaluate

MLP, SHIFT, GROUPS = cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[3]
some_cases = pytest.mark.parametrize("case", [SHIFT, GROUPS], ids=lambda case: case.name)
OPTIONS = {"damping": 0.05, "decay": 0.7, "momentum": 0.8, "weight_decay": 0.02, "kl_clip": 5e-3}
RATES = {
    "number": 0.2,
    "tensor": torch.tensor(0.2, dtype=torch.float64),
    "schedule": lrkfac.schedules.warmup_cosine_decay_schedule(0.1, 0.3, 2, 5),
}
each_rate = pytest.mark.parametrize("rate", RATES.values(), ids=RATES.keys())


def path(tx, case, steps=4):
    """The parameters after each step, with statistics at every second."""
    _, evaluate = layers_and_evaluate(case)
    params, state, reached = case.params, tx.init(case.params), []
    for i in range(steps):
        e = evaluate(params, statistics=i % 2 == 0)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        reached.append(params)
    return reached


def by_hand(layers, structure, rate, damping, decay, momentum, weight_decay, kl_clip):
    return lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, structure, damping=damping, decay=decay),
        lrkfac.clip_by_kl(kl_clip, rate),
        lrkfac.trace(momentum),
        lrkfac.add_decayed_weights(weight_decay),
        lrkfac.scale_by_learning_rate(rate),
    )


def same(actual, expected):
    assert optree.tree_all(optree.tree_map(torch.equal, actual, expected))


@some_cases
@each_rate
def test_each_argument_goes_where_it_belongs(case, rate):
    layers, _ = layers_and_evaluate(case)
    two = kronecker(low_rank(2), low_rank_plus_diagonal(2))
    expected = path(by_hand(layers, two, rate, **OPTIONS), case)
    same(path(low_rank_kfac(layers, rate, rank=2, **OPTIONS), case), expected)
    same(path(low_rank_kfac(layers, rate, 2, *OPTIONS.values()), case), expected)
    expected = path(by_hand(layers, DENSE, rate, **OPTIONS), case)
    same(path(kfac(layers, rate, **OPTIONS), case), expected)
    same(path(kfac(layers, rate, *OPTIONS.values()), case), expected)


@some_cases
def test_defaults(case):
    layers, _ = layers_and_evaluate(case)
    values = {"damping": 1e-2, "decay": 0.95, "momentum": 0.9, "weight_decay": 0.0, "kl_clip": 1e-3}
    default = kronecker(low_rank(32), low_rank_plus_diagonal(32))
    same(path(low_rank_kfac(layers, 0.1), case), path(by_hand(layers, default, 0.1, **values), case))
    same(path(kfac(layers, 0.1), case), path(by_hand(layers, DENSE, 0.1, **values), case))


@some_cases
@pytest.mark.parametrize("gradient_decay", [None, 0.0, 0.9])
def test_the_adaptive_chain(case, gradient_decay):
    """Sums of gradients are preconditioned; with no memory, each batch's own."""
    layers, _ = layers_and_evaluate(case)
    both = kronecker(low_rank(2, weight=2.0), low_rank_plus_diagonal(2, weight=0.5))
    preconditioner = lrkfac.precondition_by_fisher(layers, both, decay=0.7)
    if gradient_decay != 0:
        preconditioner = lrkfac.chain(lrkfac.trace(gradient_decay or 0.6), preconditioner)
    by_hand = lrkfac.chain(lrkfac.scale_by_quadratic_model(preconditioner, 0.2, 0.01))
    options = {} if gradient_decay is None else {"gradient_decay": gradient_decay}
    same(path(lrkfac.adaptive_low_rank_kfac(layers, 2, 0.2, 0.7, 0.01, **options), case), path(by_hand, case))


@pytest.mark.parametrize("make", [lambda layers, rate: low_rank_kfac(layers, rate, rank=1), kfac])
@each_rate
def test_laws(make, rate):
    layers, evaluate = layers_and_evaluate(SHIFT)
    check_transformation(make(layers, rate), SHIFT.params, lambda p: ((e := evaluate(p)).grads, {"evaluation": e}))


@pytest.mark.parametrize("case", [*cases.LINEAR, *cases.CONVOLUTION], ids=lambda case: case.name)
def test_kfac_equals_the_reference_under_a_schedule(case):
    """Learning rates, clipping, momentum and weight decay over several steps, by the references alone."""
    layers, evaluate = layers_and_evaluate(case, "empirical")
    schedule = RATES["schedule"]
    rates = [reference_optimizers.warmup_cosine_decay_schedule(i, 0.3, 2, 5, 0.1) for i in range(5)]
    tx, params, reached, clipped = kfac(layers, schedule, **OPTIONS), case.params, None, []
    state = tx.init(params)
    for rate in rates:
        one = reference_networks.dense_kfac_step(
            case, reached, estimator="empirical", damping=OPTIONS["damping"], decay=OPTIONS["decay"]
        )
        clipped.append(reference_optimizers.clipped_by_kl(one.preconditioned, one.gradients, rate, OPTIONS["kl_clip"]))
        direction = reference_optimizers.decayed_weights_added(
            reference_optimizers.momentum_trace(clipped, OPTIONS["momentum"])[-1], case.params, OPTIONS["weight_decay"]
        )
        expected = {k: p - rate * direction[k] for k, p in case.params.items()}
        e = evaluate(params)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-10)
        case, reached = case._replace(params=expected), one.state


def test_micro_batches_are_merged_not_accumulated():
    layers, _ = layers_and_evaluate(MLP)
    for inner in (lrkfac.kfac(layers, 0.1), lrkfac.adaptive_low_rank_kfac(layers, rank=2)):
        with pytest.raises(ValueError, match=r"inner: it preconditions.*merge_evaluations"):
            lrkfac.accumulate(inner, 2).init(MLP.params)
