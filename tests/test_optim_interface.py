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
    assert optimizer.param_groups[0]["lr"] == 0.2
    same(kept["state"][0]["chain"]["state"], optimizer.state_dict()["state"][0]["chain"]["state"])


def test_hooks_of_torch_are_called():
    net, ((x, y), *_) = plain(torch.float64), batches(1)
    optimizer, called = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, **OPTIONS), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: called.append(list(state["state"][0])))
    optimizer.step(x, y)
    optimizer.state_dict()
    assert called == ["before", "after", ["step", "chain"]]


def after(change):
    return lambda o, x, y: (change(o._module), o.step(x, y))


def losing(o, x, y):
    o.step(lambda: torch.nn.functional.cross_entropy(o._module(x), y))


def backward(o, x, y, scale=1.0):
    (scale * torch.nn.functional.cross_entropy(o._module(x), y)).backward()
    o.step()


FOREIGN = r"step: expected evaluations, got \['0\.weight', .*in Lightning and in the Trainer of transformers within"
NOTHING = "step: nothing to step with"
CLIMBING = (lambda o, x, y: (o.param_groups[0].update(lr=-0.1), o.step(x, y)), ValueError)
WITHOUT = (lambda o, x, y: (o.evaluate(x, y), o.zero_grad(), o.step()), ValueError)
OTHER_LAYER = (after(lambda net: net.__setitem__(3, torch.nn.Linear(8, 3).double())), ValueError)
FROZEN = (after(lambda net: net[0].weight.requires_grad_(False)), ValueError)
REFUSED = {
    "a loss": (losing, TypeError, "step: expected a closure that returns an Evaluation, got Tensor"),
    "a backward pass": (backward, TypeError, FOREIGN),
    "a backward pass after a step": (lambda o, x, y: (o.step(x, y), backward(o, x, y)), TypeError, FOREIGN),
    "a gradient of zeros": (lambda o, x, y: backward(o, x, y, 0.0), TypeError, NOTHING),
    "nothing": (lambda o, x, y: o.step(), TypeError, NOTHING),
    "nothing new": (lambda o, x, y: (o.step(x, y), o.step()), TypeError, NOTHING),
    "nothing newer": (lambda o, x, y: (o.evaluate(x, y), o.step(), o.step()), TypeError, NOTHING),
    "inputs alone": (lambda o, x, y: o.step(x), TypeError, "step: expected a closure"),
    "statistics alone": (lambda o, x, y: o.step(statistics=True), TypeError, "step: statistics"),
    "no gradient": (*WITHOUT, r"step: .* have no \.grad"),
    "a rate that climbs": (*CLIMBING, r"lr: expected a finite number in \[0"),
    "another mode": (after(lambda net: net[1].eval()), ValueError, "module: '1' is in eval mode"),
    "another layer": (*OTHER_LAYER, r"module: \['3\.weight', '3\.bias'\] have been replaced"),
    "frozen later": (*FROZEN, r"module: \['0\.weight'\] have been replaced or frozen"),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, match):
    net, ((x, y),) = normalised(torch.float64), batches(1)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, **OPTIONS)
    with pytest.raises(error, match=match):
        call(optimizer, x, y)


def test_wrong_arguments():
    net, ((x, _),) = plain(torch.float64), batches(1)
    one = {"params": net[0].parameters(), "lr": 0.1}
    for match, options in {
        "lr: missing": {},
        "momentun": {"lr": 0.1, "momentun": 0.5},
        "a group sets no .*lr": {"params": [one, {"params": net[2].parameters()}]},
        "lr: adaptive_low_rank_kfac finds": {"params": [one], "transformation": lrkfac.adaptive_low_rank_kfac},
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            LowRankKFAC(net, lrkfac.categorical(), x, **options)


FORGOTTEN = {
    "module: expected an nn.Module, got generator; pass the module, not its parameters": lambda net, x: (
        net.parameters(),
    ),
    "module: expected an nn.Module, got list; pass the module": lambda net, x: (
        [{"params": list(net.parameters())}],
        lrkfac.categorical(),
        x,
    ),
    "likelihood: missing; .*LowRankKFAC": lambda net, x: (net,),
    "inputs: missing; .*LowRankKFAC": lambda net, x: (net, lrkfac.categorical()),
}


@pytest.mark.parametrize("match", FORGOTTEN)
def test_a_call_as_of_another_optimizer_says_what_is_missing(match):
    net, ((x, _),) = plain(torch.float64), batches(1)
    with pytest.raises(TypeError, match=match):
        LowRankKFAC(*FORGOTTEN[match](net, x), lr=0.1)
