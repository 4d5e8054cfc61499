"""``LowRankKFAC`` in the hands of what is built for ``torch.optim``; what it refuses."""

import pytest
import torch

import lrkfac
from lrkfac import LowRankKFAC
from tests.test_optim import OPTIONS, batches, by_class, normalised, plain, same


def test_state_dict_of_another_changes_nothing():
    net, data = plain(torch.float64), batches(2)
    optimizer = by_class(net, data, lr=0.2, **OPTIONS)
    other = by_class(plain(torch.float64), data, lr=0.3, **OPTIONS | {"rank": 3})
    kept = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"state_dict: expected '0\.blocks.*shape"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected that of a LowRankKFAC"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2 and not optimizer.state
    same(kept["state"]["chain"]["state"], optimizer.state_dict()["state"]["chain"]["state"])


def test_hooks_of_torch_are_called():
    net, ((x, y), *_) = plain(torch.float64), batches(1)
    optimizer, called = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, **OPTIONS), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: called.append(sorted(state["state"])))
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
    "transformation": ({"lr": 0.1, "transformation": lambda *_: 1}, TypeError, "transformation: expected"),
    "an unknown option": ({"lr": 0.1, "momentun": 0.5}, TypeError, "momentun"),
}


@pytest.mark.parametrize(("options", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        LowRankKFAC(plain(torch.float64), lrkfac.categorical(), batches(1)[0][0], **options)
