"""Loops around ``LowRankKFAC`` as users of ``torch.optim`` write them, against a loop that is written out plainly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import lrkfac
from lrkfac import LowRankKFAC, merge_evaluations

KFAC = {"lr": 0.2, "rank": 3, "damping": 0.05, "momentum": 0.8, "weight_decay": 0.01, "kl_clip": 10.0}
ADAPTIVE = {"transformation": lrkfac.adaptive_low_rank_kfac, "rank": 3, "dense_up_to": 0}
NORM = 0.05
each_chain = pytest.mark.parametrize("options", [KFAC, ADAPTIVE], ids=["low rank", "adaptive"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(steps=3, sizes=(3, 1, 4)):
    """Micro-batches whose first example is ignored, unless there is no other: terms are their weights."""
    torch.manual_seed(1)
    labels = lambda n: torch.randint(3, (n,)).index_fill(0, torch.arange(min(n - 1, 1)), -100)  # noqa: E731
    return [[(torch.randn(n, 6).double(), labels(n)) for n in sizes] for _ in range(steps)]


def joined(parts):
    return tuple(torch.cat(some) for some in zip(*parts, strict=True))


LIKELIHOOD = lrkfac.categorical(ignore_index=-100)


def optimizer_of(net, options=KFAC):
    return LowRankKFAC(net, LIKELIHOOD, torch.zeros(2, 6).double(), estimator="exact", statistics_every=2, **options)


def plain_loop(net, data, options=KFAC, changed=lambda grads: grads):
    """Parameters after one step for each batch, by functions, with autograd's gradients after what is done to them."""
    options = {name: x for name, x in options.items() if name not in ("lr", "transformation")}
    rate = () if "momentum" not in options else (KFAC["lr"],)
    make = lrkfac.low_rank_kfac if rate else lrkfac.adaptive_low_rank_kfac
    net = copy.deepcopy(net)
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, data[0][0])
    evaluate, tx = lrkfac.evaluator(model, LIKELIHOOD, layers, "exact"), make(layers, *rate, **options)
    state = tx.init(params)
    for i, (x, y) in enumerate(data):
        net.load_state_dict(params)
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        grads = changed(dict(zip(params, grads, strict=True)))
        evaluation = evaluate(params, x, y, statistics=i % 2 == 0)._replace(grads=grads)
        updates, state = tx.update(grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
    return params


def clipped(grads, norm=NORM):
    """``clip_grad_norm_`` as its documentation says."""
    total = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
    return {name: g * min(1.0, norm / (float(total) + 1e-6)) for name, g in grads.items()}


def close(net, expected):
    torch.testing.assert_close(dict(net.named_parameters()), expected, rtol=1e-9, atol=1e-11)


@each_chain
def test_evaluations_since_the_last_step_make_one_batch(options):
    net, data = network(), batches()
    expected = plain_loop(net, [joined(parts) for parts in data], options)
    optimizer = optimizer_of(net, options)
    for parts in data:
        for i in range(len(parts)):
            optimizer.evaluate(*parts[i])
            x, y = joined(parts[: i + 1])
            grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
            torch.testing.assert_close([p.grad for p in net.parameters()], list(grads), rtol=1e-9, atol=1e-11)
        loss = F.cross_entropy(net(x), y).detach()
        torch.testing.assert_close(optimizer.step(), loss)
    close(net, expected)


def clip(net):
    clip_grad_norm_(net.parameters(), NORM)


def clip_anew(net):
    for p in net.parameters():
        p.grad = p.grad.clone()
    clip(net)


def clip_by_data(net):
    """Changes by way of ``.data`` leave no trace in version counters."""
    for p, grad in zip(net.parameters(), clipped({p: p.grad for p in net.parameters()}).values(), strict=True):
        p.grad.data.copy_(grad)


def evaluated(optimizer, net, parts, change=clip):
    """Evaluations, and what is done to gradients after them."""
    evaluations = [optimizer.evaluate(*part) for part in parts]
    change(net)
    return evaluations


def merged_twice(o, net, parts):
    one, *others = evaluated(o, net, parts[::-1])
    whole = merge_evaluations([one, merge_evaluations(others)])
    o.step(lambda: whole)


def last_in_the_closure(o, net, parts):
    """As trainers do that accumulate: closures of all but the last micro-batch are called apart from the step."""
    for part in parts[:-1]:
        o.evaluate(*part)
    o.step(lambda: evaluated(o, net, parts[-1:])[0])


def a_loss_from_the_closure(o, net, parts):
    o.evaluate(*parts[0])
    o.step(lambda: (o.zero_grad(), sum(e.loss for e in evaluated(o, net, parts)) / len(parts))[1])


WAYS = {
    "accumulated": lambda o, net, parts: (evaluated(o, net, parts), o.step()),
    "merged twice": merged_twice,
    "merged": lambda o, net, parts: o.step(merge_evaluations(evaluated(o, net, parts, clip_by_data))),
    "merged in the closure": lambda o, net, parts: o.step(
        lambda: merge_evaluations(evaluated(o, net, parts, clip_anew))
    ),
    "last in the closure": last_in_the_closure,
    "a loss from the closure": a_loss_from_the_closure,
}


@each_chain
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_done_to_gradients_before_a_step_counts(way, options):
    net, data = network(), batches()
    expected = plain_loop(net, [joined(parts) for parts in data], options, clipped)
    optimizer = optimizer_of(net, options)
    for parts in data:
        way(optimizer, net, parts)
    close(net, expected)


def test_what_is_done_between_evaluations_counts():
    """Each micro-batch's gradient is clipped when it is added, as where ``.grad`` accumulates."""
    net, ((one, two),) = network(), batches(1, (5, 3))
    grads = [torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())) for x, y in (one, two)]
    expected = [(4 * f + 2 * g) / 6 for f, g in zip(clipped(dict(enumerate(grads[0]))).values(), grads[1], strict=True)]
    optimizer = optimizer_of(net)
    evaluated(optimizer, net, [one])
    optimizer.evaluate(*two)
    torch.testing.assert_close([p.grad for p in net.parameters()], expected, rtol=1e-9, atol=1e-11)


ZEROING = {
    "the optimizer's": lambda o, net: o.zero_grad(),
    "in place": lambda o, net: o.zero_grad(set_to_none=False),
    "the module's": lambda o, net: net.zero_grad(),
    "the module's in place": lambda o, net: net.zero_grad(set_to_none=False),
    "by hand": lambda o, net: [setattr(p, "grad", None) for p in net.parameters()],
}


@pytest.mark.parametrize("zero", ZEROING.values(), ids=ZEROING)
@pytest.mark.parametrize("then", ["evaluate", "step"])
def test_zero_grad_drops_what_waits(zero, then):
    net, ((first, *others),) = network(), batches(1)
    expected = plain_loop(net, [joined(others)])
    optimizer = optimizer_of(net)
    optimizer.evaluate(*first)
    zero(optimizer, net)
    if then == "step":
        optimizer.step(*joined(others))
    else:
        for part in others:
            optimizer.evaluate(*part)
        optimizer.step()
    close(net, expected)


def test_gradients_of_another_evaluation_are_its_own():
    """One with other gradients than ``evaluate`` returned, merged or not, and one that a function made."""
    net, (parts,) = network(), batches(1)
    expected = plain_loop(net, [joined(parts)], changed=clipped)

    def replaced(evaluation):
        return evaluation._replace(grads=clipped(evaluation.grads))

    evaluate = lrkfac.evaluator(lrkfac.from_module(net)[0], LIKELIHOOD, optimizer_of(net).layers, "exact")
    for way in (
        lambda o: o.step(replaced(o.evaluate(*joined(parts)))),
        lambda o: o.step(lambda: replaced(merge_evaluations([o.evaluate(*part) for part in parts]))),
        lambda o: o.step(lambda: replaced(evaluate(o.params, *joined(parts)))),
    ):
        one = copy.deepcopy(net)
        way(optimizer_of(one))
        close(one, expected)


def both_changed(o, net, parts):
    evaluation = o.evaluate(*parts[0])
    net[0].weight.grad.mul_(2)
    o.step(evaluation._replace(grads=clipped(evaluation.grads)))


REFUSED = {
    "a gradient before": (
        lambda o, net, parts: (net(parts[0][0]).sum().backward(), o.evaluate(*parts[0])),
        r"evaluate: \['0\.weight', .*\] have a \.grad that is not of evaluate",
    ),
    "a batch while others wait": (
        lambda o, net, parts: (o.evaluate(*parts[0]), o.step(*parts[1])),
        "step: 1 evaluations since the last step wait",
    ),
    "both gradients": (both_changed, r"step: both \.grad and the gradients of the evaluation"),
    "other parameters": (
        lambda o, net, parts: (o.evaluate(*parts[0]), nn.init.ones_(net[2].bias), o.evaluate(*parts[1])),
        r"evaluate: \['2\.bias'\] have changed",
    ),
    "one left out": (
        lambda o, net, parts: o.step(merge_evaluations([o.evaluate(*part) for part in parts][1:])),
        "step: the evaluation is made of 2 of the 3",
    ),
    "one of three": (
        lambda o, net, parts: o.step(*[o.evaluate(*part) for part in parts][:1]),
        "step: the evaluation is made of 1 of the 3",
    ),
    "one gradient gone": (
        lambda o, net, parts: (o.evaluate(*parts[0]), setattr(net[0].bias, "grad", None), o.evaluate(*parts[1])),
        r"evaluate: \['0\.bias'\] have no \.grad",
    ),
    "some statistics": (
        lambda o, net, parts: ([o.evaluate(*parts[i], statistics=i == 0) for i in (0, 1)], o.step()),
        "evaluations: expected statistics of all or of none",
    ),
}


@pytest.mark.parametrize(("loop", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(loop, match):
    net, (parts,) = network(), batches(1)
    optimizer = optimizer_of(net)
    state = optimizer.chain_state
    with pytest.raises(ValueError, match=match):
        loop(optimizer, net, parts)
    assert optimizer.steps == 0 and optimizer.chain_state is state
    optimizer.zero_grad()
    optimizer.step(*parts[0])
