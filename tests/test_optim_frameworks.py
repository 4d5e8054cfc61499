"""``LowRankKFAC`` in the hands of frameworks: ``GradScaler``, wrappers, distributed checkpoints, hooks, state dicts.

``Wrapper`` and ``CopyingWrapper`` do to an optimizer what Lightning's do; Lightning itself trains in ``tests/peers``.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_

from tests.test_optim_loops import NORM, batches, clipped, close, each_chain, joined, network, optimizer_of, plain_loop


def data_of(steps=3):
    return [joined(parts) for parts in batches(steps)]


def state_of(net, optimizer):
    """Everything that a step changes."""
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()))


def equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_grad_scaler_changes_no_step(enabled):
    net, data = network(), data_of()
    expected = plain_loop(net, data, changed=clipped)
    optimizer, scaler = optimizer_of(net), torch.amp.GradScaler("cpu", enabled=enabled)
    for x, y in data:
        scaler.scale(optimizer.evaluate(x, y).loss)
        clip_grad_norm_(net.parameters(), NORM)
        scaler.step(optimizer)
        scaler.update()
    close(net, expected)
    assert optimizer.steps == 3


def left_out(optimizer, scaler, x, y, factor=1.0):
    optimizer.evaluate(x, y)
    optimizer.param_groups[0]["params"][1].grad[1] *= factor
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2


def unscaled(optimizer, scaler, x, y):
    scaler.scale(optimizer.evaluate(x, y).loss)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


INFINITE = torch.zeros(8, 6).index_fill(0, torch.tensor([1]), float("inf"))
SCALED = {
    "infinite inputs": (lambda o, s, x, y: left_out(o, s, x + INFINITE, y), None),
    "a gradient of no number": (lambda o, s, x, y: left_out(o, s, x, y, float("nan")), None),
    "unscaled": (unscaled, r"step: unscale_\(\) has divided \.grad"),
    "a batch": (lambda o, s, x, y: s.step(o, x, y), r"step: a GradScaler looks at \.grad before the step"),
    "a closure": (lambda o, s, x, y: s.step(o, lambda: o.evaluate(x, y)), "step: a GradScaler looks at"),
}


@pytest.mark.parametrize(("step", "match"), SCALED.values(), ids=SCALED)
def test_infinity_leaves_out_the_step_alone_and_what_a_grad_scaler_cannot_see_is_refused(step, match):
    """Nothing changes, and the next step is as if there had been no other."""
    net, (first, second, _) = network(), data_of()
    expected = plain_loop(net, [first, second])
    optimizer, scaler = optimizer_of(net), torch.amp.GradScaler("cpu")
    optimizer.step(*first)
    before = state_of(net, optimizer)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match=match) if match else nullcontext():
        step(optimizer, scaler, *second)
    equal(state_of(net, optimizer), before)
    if match:
        optimizer.zero_grad()
    optimizer.evaluate(*second)
    optimizer.step()
    close(net, expected)


class Wrapper:
    """Lightning's: its class inherits the optimizer's, attributes are the optimizer's, ``step`` passes a closure."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (self.__class__, type(optimizer)), {})

    def step(self, closure=None, **kwargs):
        return self._optimizer.step(closure=closure or (lambda: None), **kwargs)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class CopyingWrapper(Wrapper):
    """Lightning 2.0's, whose attributes are those that the optimizer had when it was wrapped."""

    def __init__(self, optimizer):
        self.__dict__ = {name: x for name, x in vars(optimizer).items() if name != "step"}
        super().__init__(optimizer)


@pytest.mark.parametrize("wrapper", [Wrapper, CopyingWrapper])
@each_chain
def test_what_is_evaluated_through_a_wrapper_is_stepped(wrapper, options):
    """Micro-batches, clipping, a step without closure, and closures that return nothing, a loss or an evaluation."""
    net, data = network(), batches(4)
    expected = plain_loop(net, [joined(parts) for parts in data], options, clipped)
    wrapped = wrapper(optimizer_of(net, options))

    def evaluated(parts):
        evaluations = [wrapped.evaluate(*part) for part in parts]
        clip_grad_norm_(net.parameters(), NORM)
        return evaluations

    evaluated(data[0])
    wrapped.step()
    wrapped.step(closure=lambda: evaluated(data[1])[:0] or None)
    wrapped.zero_grad()
    wrapped.step(closure=lambda: sum(e.loss for e in evaluated(data[2])))

    wrapped.step(lambda: evaluated([joined(data[3])])[0])
    close(net, expected)
    assert wrapped.steps == wrapped._optimizer.steps == 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@each_chain
def test_distributed_state_dicts(options, flat, tmp_path):
    """Of a fresh optimizer, too; a run that goes on from the files is that which did not stop."""
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, data = network(), data_of(4)
    optimizer, fresh_net = optimizer_of(net, options), copy.deepcopy(net)
    before = state_of(net, optimizer)
    get_optimizer_state_dict(net, optimizer, options=how)
    equal(state_of(net, optimizer), before)
    assert all(p.grad is None for p in net.parameters())
    for x, y in data[:2]:
        optimizer.step(x, y)
    saved = {"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer, options=how)}
    dcp.save(saved, checkpoint_id=tmp_path)
    fresh = optimizer_of(fresh_net, options)
    loaded = {"net": fresh_net.state_dict(), "optimizer": get_optimizer_state_dict(fresh_net, fresh, options=how)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    fresh_net.load_state_dict(loaded["net"])
    fresh.evaluate(*data[0])  # does not wait any more once another state is there
    set_optimizer_state_dict(fresh_net, fresh, loaded["optimizer"], options=how)
    equal(state_of(fresh_net, fresh), state_of(net, optimizer))
    for x, y in data[2:]:
        optimizer.step(x, y)
        fresh.step(x, y)
    equal(state_of(fresh_net, fresh), state_of(net, optimizer))


def test_hooks_of_state_dict_and_load_state_dict():
    """What a hook before loading returns counts for all, and one after it sees all and may add to ``state``."""
    net, data = network(), data_of()
    optimizer, other, seen = optimizer_of(net), optimizer_of(copy.deepcopy(net)), []
    optimizer.step(*data[0])
    weight, one = net[0].weight, optimizer.state_dict()
    assert list(one["state"]) == one["param_groups"][0]["params"] == [0, 1, 2, 3]
    optimizer.register_state_dict_pre_hook(lambda o: o.state[weight].update(mark=torch.ones(2)))
    optimizer.register_state_dict_post_hook(lambda o, packed: {**packed, "more": packed["state"][0]["chain"]["steps"]})
    optimizer.step(*data[1])
    two = optimizer.state_dict()
    assert two["more"] == 2 and torch.equal(two["state"][0]["mark"], torch.ones(2))
    assert set(optimizer.state[weight]) == {"step", "chain", "mark"} and optimizer.state[weight]["step"] == 2

    changed = copy.deepcopy(two)
    changed["param_groups"][0]["lr"] = 0.7
    other.register_load_state_dict_pre_hook(lambda o, packed: changed)

    def after(o):
        seen.append((o.steps, o.param_groups[0]["lr"], o.state_dict()["state"][0]["chain"]["steps"]))
        o.state["mine"] = {"seen": True}

    other.register_load_state_dict_post_hook(after)
    groups = [set(group) for group in other.param_groups]
    other.load_state_dict(one)
    assert seen == [(2, 0.7, 2)] and other.state["mine"] == {"seen": True}
    equal(other.state_dict()["state"][0]["chain"], two["state"][0]["chain"])
    assert [set(group) for group in other.param_groups] == groups
    assert [set(entry) for entry in list(other.state.values())[:2]] == [{"step", "chain", "mark"}, {"step"}]
    assert other.state[other.param_groups[0]["params"][0]]["chain"] == {}
    assert "differentiable" not in other.defaults

    def raising(o, packed):
        raise RuntimeError("no")

    before = other.state_dict()
    other.register_load_state_dict_pre_hook(raising)
    with pytest.raises(RuntimeError, match="no"):
        other.load_state_dict(one)
    equal(other.state_dict(), before)
