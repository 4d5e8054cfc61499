"""Several ``param_groups`` of ``LowRankKFAC``: the functional loop with trees of hyperparameters, bit for bit."""

import copy

import optree
import pytest
import torch
from torch import nn

import lrkfac
from lrkfac import LowRankKFAC
from tests.test_optim import OPTIONS, batches, functional, normalised, plain, same, trained

VALUES = [{"lr": 0.2, "weight_decay": 0.0}, {"momentum": 0.5}, {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.1}]
DEFAULTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
KFAC = {"damping": 0.05, "kl_clip": 5e-3}


def split(net):
    """Biases and all vectors; the head's weight; the rest."""
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    last = max(n for n, p in named.items() if p.ndim == 2)
    vectors = [n for n, p in named.items() if p.ndim < 2]
    return vectors, [last], [n for n in named if n not in vectors and n != last]


def groups_and_trees(net):
    named, parts = dict(net.named_parameters()), [*zip(split(net), VALUES, strict=True)]
    groups = [{"params": [named[n] for n in names], **values} for names, values in parts if names]
    return groups, {name: {n: v.get(name, x) for names, v in parts for n in names} for name, x in DEFAULTS.items()}


def stepped(optimizer, data):
    for x, y in data:
        optimizer.step(x, y)
    return optimizer


@pytest.mark.parametrize(
    ("make", "transformation", "thin"), [(normalised, lrkfac.low_rank_kfac, True), (plain, lrkfac.kfac, False)]
)
def test_equals_the_functional_loop_with_trees_bit_for_bit(make, transformation, thin):
    """Also where a scheduler changes the learning rate of each group in its own way."""
    net, data = make(torch.float64), batches(6)
    (groups, values), halved = groups_and_trees(net), lambda i: 0.5 ** min(i, 3)
    start, head = values.pop("lr"), split(net)[1]
    rates = [{n: r if n in head else r * halved(i) for n, r in start.items()} for i in range(len(data))]
    torch.manual_seed(1)
    expected = functional(copy.deepcopy(net), data, transformation, rates=rates, thin=thin, **KFAC, **values)
    torch.manual_seed(1)
    options = {"params": groups, "transformation": transformation, "thin": thin, "statistics_every": 3}
    optimizer = LowRankKFAC(net, lrkfac.categorical(), data[0][0], **options, **DEFAULTS, **KFAC)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [halved, lambda i: 1.0, halved])
    for x, y in data:
        optimizer.step(x, y)
        scheduler.step()
    same(trained(net), expected)


def test_momentum_and_weight_decay_are_read_in_each_step():
    """Also where a scheduler turns momentum, and of one group."""
    net, data = plain(torch.float64), batches(4)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), data[0][0], 0.2, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20)
    seen = []
    for i, (x, y) in enumerate(data):
        optimizer.param_groups[0]["weight_decay"] = 0.1 * i
        before, params = optimizer.chain_state, {n: p.clone() for n, p in optimizer.params.items()}
        evaluation = optimizer.evaluate(x, y)
        optimizer.step()
        group = optimizer.param_groups[0]
        now = {name: group[name] for name in ("momentum", "weight_decay")}
        tx = lrkfac.low_rank_kfac(optimizer.layers, group["lr"], **{**OPTIONS, **now})
        # The state of a number, not of a schedule, has no counter.
        updates, _ = tx.update(evaluation.grads, (*before[:-1], ()), params, evaluation=evaluation)
        same(optimizer.params, lrkfac.apply_updates(params, updates))
        seen.append(now["momentum"])
        scheduler.step()
    assert len(set(seen)) == 4


def test_rates_that_are_tensors_are_apart():
    net, ((x, _),) = plain(torch.float64), batches(1)
    parts = [{"params": part.parameters()} for part in (net[:2], net[2:])]
    one, two = LowRankKFAC(net, lrkfac.categorical(), x, torch.tensor(0.1), params=parts, **OPTIONS).param_groups
    one["lr"].mul_(2)
    assert float(two["lr"]) == pytest.approx(0.1)


def test_what_is_in_no_group_is_constant():
    net, data = plain(torch.float64), batches(3)
    frozen = copy.deepcopy(net).requires_grad_(False)
    frozen[-1].requires_grad_(True)
    for module, options in (net, {"params": net[-1].parameters()}), (frozen, {}):
        torch.manual_seed(1)
        stepped(LowRankKFAC(module, lrkfac.categorical(), data[0][0], 0.2, **options, **OPTIONS), data)
    same(net.state_dict(), frozen.state_dict())
    assert all(p.grad is None for p in net[:-1].parameters())


def test_a_group_that_is_added():
    """What was known is kept, and the loop goes on as one that starts from there."""
    net, data = plain(torch.float64), batches(6)
    net[:2].requires_grad_(False)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), data[0][0], 0.2, statistics_every=4, **OPTIONS)
    stepped(optimizer, data[:2])
    before = optimizer.chain_state
    group = {"params": net[:2].requires_grad_(True).parameters(), "lr": 0.05}
    optimizer.add_param_group(group)
    assert set(group) == {"params", "lr"} and [layer.name for layer in optimizer.layers] == ["0", "2", "4"]
    assert all(optimizer.chain_state[0][0][name] is before[0][0][name] for name in ("2", "4"))
    same({n: x for n, x in optimizer.chain_state[2].trace.items() if not n.startswith("0")}, before[2].trace)

    model, params = lrkfac.from_module(copy.deepcopy(net))
    rates = {n: 0.05 if n.startswith("0") else 0.2 for n in params}
    layers = lrkfac.find_layers(model, params, data[0][0])
    tx = lrkfac.low_rank_kfac(layers, {n: lrkfac.schedules.constant_schedule(r) for n, r in rates.items()}, **OPTIONS)
    evaluate, state = lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=True), optimizer.chain_state
    torch.manual_seed(1)
    for i, (x, y) in enumerate(data[2:]):
        evaluation = evaluate(params, x, y, statistics=i == 0)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
    torch.manual_seed(1)
    stepped(optimizer, data[2:])
    same(trained(net), params)


def test_a_weight_that_gets_a_bias_is_another_layer():
    net, data = plain(torch.float64), batches(2)
    net[2].bias.requires_grad_(False)
    optimizer = stepped(LowRankKFAC(net, lrkfac.categorical(), data[0][0], 0.2, **OPTIONS), data[:1])
    before = optimizer.chain_state[0][0]
    optimizer.add_param_group({"params": net[2].bias.requires_grad_(True)})
    after = optimizer.chain_state[0][0]
    assert [after[name] is before[name] for name in ("0", "2", "4")] == [True, False, True]
    fresh = optimizer.transformation.init(optimizer.params)[0][0]["2"]
    assert optree.tree_all(optree.tree_map(torch.equal, after["2"], fresh))
    stepped(optimizer, data[1:])


STRANGER = nn.Parameter(torch.ones(2))
REFUSED = {
    "damping.*curvature": lambda net: [{"params": net[0].parameters(), "damping": 0.1}],
    "momentun": lambda net: [{"params": net[0].parameters(), "momentun": 0.1}],
    r"params: expected parameters of the module.*\[0\]": lambda net: [STRANGER],
    r"params: \['2\.weight', '2\.bias'\] require no gradient": lambda net: [{"params": net[2].parameters()}],
    "more than one parameter group": lambda net: [{"params": [net[0].weight]}] * 2,
    "momentum.*: expected": lambda net: [{"params": net[0].parameters(), "momentum": 1.0}],
}


@pytest.mark.parametrize(("match", "groups"), REFUSED.items(), ids=REFUSED)
def test_refused(groups, match):
    net, ((x, y),) = plain(torch.float64), batches(1)
    net[2].requires_grad_(False)
    with pytest.raises(ValueError, match=match):
        LowRankKFAC(net, lrkfac.categorical(), x, 0.1, params=groups(net), **OPTIONS)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), x, 0.1, params=net[4].parameters(), **OPTIONS)
    layers, state, more = optimizer.layers, optimizer.chain_state, groups(net)
    with pytest.raises(ValueError, match=match):
        for group in more:
            optimizer.add_param_group(group if isinstance(group, dict) else {"params": group})
    assert len(more) > 1 or (optimizer.layers is layers and optimizer.chain_state is state)
    optimizer.step(x, y)
