"""``LowRankKFAC`` in the hands of what is built for ``torch.optim``; what it refuses."""

import copy
import io

import pytest
import torch

import lrkfac
from lrkfac import LowRankKFAC
from tests.test_optim import OPTIONS, batches, by_class, normalised, plain, same, trained

SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=10, cycle_momentum=False),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers(scheduler):
    net, data = plain(torch.float64), batches(4)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), data[0][0], lr=0.2, **OPTIONS)
    scheduler, rates = scheduler(optimizer), []
    for x, y in data:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(x, y)
        scheduler.step()
    assert len(set(rates)) > 1


def test_state_dict_is_plain_and_resumes_bit_for_bit():
    net, data = normalised(torch.float64), batches(8)
    start = copy.deepcopy(net)
    torch.manual_seed(1)
    by_class(net, data, lr=0.2, **OPTIONS)

    torch.manual_seed(1)
    half = by_class(start, data[:4], lr=0.2, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(half, 100)
    file = io.BytesIO()
    parts = {"module": start.state_dict(), "optimizer": half.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(parts | {"generator": torch.get_rng_state()}, file)

    file.seek(0)
    found = torch.load(file, weights_only=True)
    other = normalised(torch.float64)
    resumed = LowRankKFAC(other, lrkfac.categorical(), data[0][0], lr=0.1, statistics_every=3, **OPTIONS)
    other.load_state_dict(found["module"])
    resumed.load_state_dict(found["optimizer"])
    assert resumed.steps == 4 and resumed.param_groups[0]["lr"] == 0.2
    torch.set_rng_state(found["generator"])
    for x, y in data[4:]:
        resumed.step(x, y)
    same(trained(other), trained(net))


def test_state_dict_of_another_changes_nothing():
    net, data = plain(torch.float64), batches(2)
    optimizer = by_class(net, data, lr=0.2, **OPTIONS)
    other = by_class(plain(torch.float64), data, lr=0.3, **OPTIONS | {"rank": 3})
    held = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"state_dict: expected '0\.blocks.*shape"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected that of a LowRankKFAC"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2 and not optimizer.state
    same(held["state"]["chain"]["state"], optimizer.state_dict()["state"]["chain"]["state"])


def test_hooks_of_torch_are_called():
    net, ((x, y), *_) = plain(torch.float64), batches(1)
    optimizer, called = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, **OPTIONS), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, found: called.append(sorted(found["state"])))
    optimizer.step(x, y)
    optimizer.state_dict()
    assert called == ["before", "after", ["chain"]]


def _with_loss(optimizer, x, y):
    optimizer.step(lambda: torch.nn.functional.cross_entropy(optimizer._module(x), y))


def _without_grad(optimizer, x, y):
    optimizer.evaluate(x, y)
    optimizer.zero_grad()
    optimizer.step()


def _in_eval_mode(optimizer, x, y):
    optimizer._module[1].eval()
    optimizer.step(x, y)


def _with_another_layer(optimizer, x, y):
    optimizer._module[3] = torch.nn.Linear(8, 3).double()
    optimizer.step(x, y)


def _frozen_later(optimizer, x, y):
    optimizer._module[0].weight.requires_grad_(False)
    optimizer.step(x, y)


REFUSED = {
    "a loss": (_with_loss, TypeError, "step: expected a closure that returns an Evaluation, got Tensor"),
    "nothing": (lambda o, x, y: o.step(), TypeError, "step: nothing to step with"),
    "nothing new": (lambda o, x, y: (o.step(x, y), o.step()), TypeError, "step: nothing to step with"),
    "nothing newer": (lambda o, x, y: (o.evaluate(x, y), o.step(), o.step()), TypeError, "step: nothing to step with"),
    "inputs alone": (lambda o, x, y: o.step(x), TypeError, "step: expected a closure"),
    "statistics alone": (lambda o, x, y: o.step(statistics=True), TypeError, "step: statistics"),
    "no gradient": (_without_grad, ValueError, r"step: .* have no \.grad"),
    "another mode": (_in_eval_mode, ValueError, "module: '1' is in eval mode"),
    "another layer": (_with_another_layer, ValueError, r"module: \['3\.weight', '3\.bias'\] have been replaced"),
    "frozen later": (_frozen_later, ValueError, r"module: \['0\.weight'\] have been replaced or frozen"),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(call, error, match):
    net, ((x, y), *_) = normalised(torch.float64), batches(1)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, **OPTIONS)
    with pytest.raises(error, match=match):
        call(optimizer, x, y)


WRONG = {
    "no lr": ({}, TypeError, "lr: missing"),
    "lr below 0": ({"lr": -0.1}, ValueError, "lr: expected a finite number in"),
    "lr not a number": ({"lr": "0.1"}, TypeError, "lr: expected a number"),
    "a vector lr": ({"lr": torch.ones(2)}, ValueError, "lr: expected a number or a tensor"),
    "rank": ({"lr": 0.1, "rank": 0}, ValueError, "rank: expected"),
    "statistics_every": ({"lr": 0.1, "statistics_every": 0}, ValueError, "statistics_every: expected"),
    "statistics_every's type": ({"lr": 0.1, "statistics_every": 1.5}, TypeError, "statistics_every: expected"),
    "transformation": ({"lr": 0.1, "transformation": lambda *_: 1}, TypeError, "transformation: expected"),
    "estimator": ({"lr": 0.1, "estimator": "no"}, ValueError, "estimator: expected"),
    "an unknown option": ({"lr": 0.1, "momentun": 0.5}, TypeError, "momentun"),
}


@pytest.mark.parametrize(("options", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        LowRankKFAC(plain(torch.float64), lrkfac.categorical(), batches(1)[0][0], **options)


def test_no_module():
    with pytest.raises(TypeError, match="module: expected"):
        LowRankKFAC(lambda x: x, lrkfac.categorical(), batches(1)[0][0], lr=0.1)
