"""``LowRankKFAC`` with every scheduler of torch, against the functional loop with the rates that it gives to SGD."""

import copy
import inspect
import io

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import lrkfac
from tests.test_optim_loops import KFAC, LIKELIHOOD, close, network, optimizer_of

STEPS, STOP = 6, 3
METRICS = [1.0, 1.0, 0.5, 0.5, 0.4, 0.4]
"""For ``ReduceLROnPlateau``: no better than before in steps 1, 3 and 5."""


def halved(i):
    return 0.5**i


def sequential(o):
    parts = [lr_scheduler.LinearLR(o, 0.2, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)]
    return lr_scheduler.SequentialLR(o, parts, [2])


def chained(o):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.3, 2), lr_scheduler.ExponentialLR(o, 0.7)], o)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halved),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.6),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 7, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.05, 0.3, step_size_up=2),  # turns momentum, too
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS + 1),  # turns momentum, too
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}
TURN_MOMENTUM = {"CyclicLR", "OneCycleLR"}


def test_every_scheduler_of_torch_is_tried():
    """A new one must be added above."""
    bases = {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler}
    names = {**vars(lr_scheduler), **vars(swa_utils)}.values()
    classes = [c for c in names if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)]
    assert {c.__name__ for c in classes if c not in bases} == set(SCHEDULERS)


def advance(scheduler, step):
    """One step of a scheduler after that of an optimizer."""
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(METRICS[step]) if plateau else scheduler.step()


def data_of(steps=STEPS):
    torch.manual_seed(1)
    return [(torch.randn(8, 6).double(), torch.randint(3, (8,))) for _ in range(steps)]


def rates_and_momenta(name):
    """What each step of SGD would use."""
    sgd = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=KFAC["lr"], momentum=KFAC["momentum"])
    scheduler, values = SCHEDULERS[name](sgd), []
    for i in range(STEPS):
        values.append((float(sgd.param_groups[0]["lr"]), sgd.param_groups[0]["momentum"]))
        sgd.step()
        advance(scheduler, i)
    return values


def functional_loop(net, data, values):
    """Parameters after each step; the chain is made anew for each rate and momentum."""
    options = {name: x for name, x in KFAC.items() if name not in ("lr", "momentum")}
    model, params = lrkfac.from_module(copy.deepcopy(net))
    layers = lrkfac.find_layers(model, params, data[0][0])
    evaluate, state, after = lrkfac.evaluator(model, LIKELIHOOD, layers, "exact"), None, []
    for i, ((x, y), (rate, momentum)) in enumerate(zip(data, values, strict=True)):
        tx = lrkfac.low_rank_kfac(layers, rate, momentum=momentum, **options)
        state = tx.init(params) if state is None else state
        evaluation = evaluate(params, x, y, statistics=i % 2 == 0)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
        after.append(params)
    return after


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_uses_the_rate_that_the_scheduler_has_set(name):
    """Also in a run that goes on from the state dicts of optimizer and scheduler."""
    values, data, net = rates_and_momenta(name), data_of(), network()
    rates, momenta = (set(column) for column in zip(*values, strict=True))
    assert len(rates) > 1 and (len(momenta) > 1) == (name in TURN_MOMENTUM)
    expected = functional_loop(net, data, values)

    def train(net, optimizer, scheduler, steps):
        for i in steps:
            group = optimizer.param_groups[0]
            assert (group["lr"], group["momentum"]) == pytest.approx(values[i], rel=1e-12)
            optimizer.step(*data[i])
            advance(scheduler, i)
            close(net, expected[i])

    optimizer = optimizer_of(net)
    scheduler = SCHEDULERS[name](optimizer)
    train(net, optimizer, scheduler, range(STOP))
    file, saved = io.BytesIO(), [part.state_dict() for part in (net, optimizer, scheduler)]
    torch.save(saved, file)
    file.seek(0)
    train(net, optimizer, scheduler, range(STOP, STEPS))

    other = network()
    fresh = optimizer_of(other)
    parts = other, fresh, SCHEDULERS[name](fresh)
    for part, state in zip(parts, torch.load(file, weights_only=False), strict=True):
        part.load_state_dict(state)
    train(*parts, range(STOP, STEPS))


def without_momentum(layers, lr):
    return lrkfac.chain(lrkfac.precondition_by_fisher(layers, rank=3), lrkfac.scale_by_learning_rate(lr))


TURNING = {
    "CyclicLR": lambda o, **more: lr_scheduler.CyclicLR(o, 0.05, 0.3, step_size_up=2, **more),
    "OneCycleLR": lambda o, **more: lr_scheduler.OneCycleLR(o, 0.3, total_steps=5, **more),
}


@pytest.mark.parametrize("name", sorted(TURN_MOMENTUM))
def test_a_chain_without_momentum_turns_the_rate_alone(name):
    """Torch itself refuses to turn momentum where there is none."""
    optimizer = optimizer_of(network(), {"lr": 0.1, "transformation": without_momentum})
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        TURNING[name](optimizer)
    scheduler, data = TURNING[name](optimizer, cycle_momentum=False), data_of(1)
    before = optimizer.param_groups[0]["lr"]
    optimizer.step(*data[0])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] != before and "momentum" not in optimizer.param_groups[0]


WITHOUT_RATE = {**SCHEDULERS, "OneCycleLR": lambda o: TURNING["OneCycleLR"](o, cycle_momentum=False)}


@pytest.mark.parametrize("name", WITHOUT_RATE)
def test_a_chain_without_a_rate_says_that_it_needs_no_scheduler(name):
    optimizer = optimizer_of(network(), {"transformation": lrkfac.adaptive_low_rank_kfac, "rank": 3})
    with pytest.raises(TypeError, match=r"lr: the optimizer was made without.*adaptive_low_rank_kfac.*no scheduler"):
        WITHOUT_RATE[name](optimizer)
