"""A copy of a ``LowRankKFAC``, by any way, steps as the original and apart from it, with the module that came along."""

import pytest
import torch
from torch import nn

import lrkfac
from lrkfac import LowRankKFAC
from tests.test_optim import OPTIONS, batches, normalised, plain, same, trained
from tests.travelling import each_way


def made(*rate, **options):
    return lambda net, x: LowRankKFAC(net, lrkfac.categorical(), x, *rate, **options)


def in_groups(net, x):
    parts = [{"params": net[:2].parameters(), "lr": 0.1, "momentum": 0.5}, {"params": net[2:].parameters(), "lr": 0.2}]
    return made(params=parts, statistics_every=3, **OPTIONS)(net, x)


ADAPTIVE = {"transformation": lrkfac.adaptive_low_rank_kfac, "rank": 2, "dense_up_to": 0, "statistics_every": 2}
CASES = {
    "one group": (plain, made(0.2, statistics_every=3, **OPTIONS)),
    "groups, BatchNorm": (normalised, in_groups),
    "rates as tensors": (plain, made(torch.tensor(0.2), rank=2)),
    "dense": (plain, made(0.2, transformation=lrkfac.kfac)),
    "nothing to tune": (plain, made(**ADAPTIVE)),
}


@each_way
@pytest.mark.parametrize(("make", "optimizer_of"), CASES.values(), ids=CASES.keys())
def test_a_copy_steps_as_the_original_and_apart_from_it(make, optimizer_of, way):
    net, data = make(torch.float64), batches(6)
    optimizer = optimizer_of(net, data[0][0])
    if "lr" in optimizer.param_groups[0]:
        torch.optim.lr_scheduler.StepLR(optimizer, 100)  # puts a function bound to the original in place of step
    for x, y in data[:3]:
        optimizer.step(x, y)
    other_net, other = way((net, optimizer))
    in_copy = {id(p) for group in other.param_groups for p in group["params"]}
    assert in_copy == {id(p) for p in other_net.parameters()} and not in_copy & {id(p) for p in net.parameters()}
    kept, state = {n: x.clone() for n, x in trained(net).items()}, optimizer.chain_state
    seed = torch.get_rng_state()
    for x, y in data[3:]:
        other.step(x, y)
    same(trained(net), kept)
    assert optimizer.chain_state is state and (optimizer.steps, other.steps) == (3, 6)
    for group in other.param_groups if "lr" in other.param_groups[0] else ():
        group["lr"] = group["lr"] * 0  # each reads its own groups
    torch.set_rng_state(seed)
    for x, y in data[3:]:
        optimizer.step(x, y)
    same(trained(net), trained(other_net))
    if "lr" in other.param_groups[0]:
        other.step(*data[0])
        weights = dict(net.named_parameters())
        same({n: p for n, p in other_net.named_parameters()}, weights)


@each_way
def test_constants_are_those_of_the_module_that_came_along(way):
    net, ((x, y),) = plain(torch.float64), batches(1)
    net[0].requires_grad_(False)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), x, 0.2, params=net[4].parameters(), **OPTIONS)
    optimizer.evaluate(x, y)
    other_net, other = way((net, optimizer))
    with torch.no_grad():
        for p in other_net[:3].parameters():
            p.mul_(2)
    expected = nn.functional.cross_entropy(other_net(x), y)
    with pytest.raises(TypeError, match="step: nothing to step with"):  # what was evaluated stays with its .grad
        other.step()
    torch.testing.assert_close(other.step(x, y), expected.detach())
