"""``LowRankKFAC`` is the functional loop in the form of ``torch.optim``, and fits what is built for that."""

import copy
import warnings
from functools import partial

import optree
import pytest
import torch
from torch import nn

import lrkfac
from lrkfac import LazyMatrix, LowRankKFAC

OPTIONS = {"rank": 2, "damping": 0.05, "weight_decay": 0.01, "kl_clip": 5e-3}


def plain(dtype):
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def normalised(dtype):
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    return net.to(dtype)


def partly_frozen(dtype):
    net = plain(dtype)
    net[0].requires_grad_(False)
    return net


MODELS = {"plain": plain, "BatchNorm": normalised, "partly frozen": partly_frozen}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def batches(number, dtype=torch.float64, size=5):
    return [(torch.randn(size, 6, dtype=dtype), torch.randint(3, (size,))) for _ in range(number)]


def functional(net, data, make, rates=None, every=3, thin=False, **options):
    """The loop of the README, with BatchNorm's buffers; parameters and buffers after it."""
    with_buffers = any(True for _ in net.buffers())
    model, params, *buffers = lrkfac.from_module(net, buffers=with_buffers)
    with_inputs = lambda x: (*buffers, x) if with_buffers else x  # noqa: E731
    layers = lrkfac.find_layers(model, params, with_inputs(data[0][0]))
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, has_aux=with_buffers, thin=thin)
    state = make(layers, *(rates or [])[:1], **options).init(params)
    for i, (x, y) in enumerate(data):
        tx = make(layers, *(rates or [])[i : i + 1], **options)
        e = evaluate(params, with_inputs(x), y, statistics=i % every == 0)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params, buffers = lrkfac.apply_updates(params, updates), [e.aux] * with_buffers
    return params | (buffers[0] if with_buffers else {})


def by_class(net, data, scheduled=False, **options):
    optimizer = LowRankKFAC(net, lrkfac.categorical(), data[0][0], statistics_every=3, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if scheduled else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it sees no step between two of the scheduler
        for x, y in data:
            optimizer.step(x, y)
            if scheduled:
                scheduler.step()
    return optimizer


def trained(net):
    """Everything that training changes."""
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    return {n: x.detach() for n, x in (*net.named_parameters(), *net.named_buffers()) if n not in frozen}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    assert {k for k in actual if not torch.equal(actual[k], expected[k])} == set()


def wide(make, dtype):
    net = make(dtype)
    net[-1] = nn.Sequential(nn.Linear(net[-1].in_features, 64), nn.Linear(64, 64), nn.Linear(64, 3)).to(dtype)
    return net


@pytest.mark.parametrize(
    ("dtype", "thin", "number"),
    [
        (torch.float32, True, None),
        (torch.float64, False, None),
        (torch.float64, True, float),
        (torch.float64, True, partial(torch.tensor, dtype=torch.float64)),
    ],
    ids=["thin", "", "scheduled", "scheduled tensor"],
)
@each_model
def test_equals_the_functional_loop_bit_for_bit(make, dtype, thin, number):
    """Also where a scheduler changes the learning rate, a number or a tensor."""
    net, data = wide(make, dtype) if thin else make(dtype), batches(7, dtype)
    constants = {n: x.clone() for n, x in net.state_dict().items() if n not in trained(net)}
    rates = [number(0.2 * 0.5 ** (i // 2)) for i in range(7)] if number else [0.2] * 7
    torch.manual_seed(1)
    expected = functional(copy.deepcopy(net), data, lrkfac.low_rank_kfac, rates=rates, thin=thin, **OPTIONS)
    torch.manual_seed(1)
    by_class(net, data, scheduled=number is not None, lr=rates[0], thin=thin, **OPTIONS)
    same(trained(net), expected)
    same({n: net.state_dict()[n] for n in constants}, constants)


def descent(layers, lr):
    return lrkfac.scale_by_learning_rate(lr)


def momentum_alone(layers):
    return lrkfac.chain(lrkfac.trace(0.5), lrkfac.scale(-0.1))


@pytest.mark.parametrize("transformation", [momentum_alone, lrkfac.adaptive_low_rank_kfac])
def test_any_chain(transformation):
    net, data = plain(torch.float64), batches(6)
    torch.manual_seed(1)
    # By default the class takes gradients by rows for ready-made chains.
    expected = functional(copy.deepcopy(net), data, transformation, thin=transformation is not momentum_alone)
    torch.manual_seed(1)
    by_class(net, data, transformation=transformation)
    same(trained(net), expected)


BY_ROWS = [({}, True), ({"transformation": lrkfac.kfac}, True), ({"thin": False}, False)]


@pytest.mark.parametrize(("options", "by_rows"), [*BY_ROWS, ({"transformation": descent}, False)])
def test_gradients_by_rows_are_for_ready_made_chains_and_steps_alone(options, by_rows):
    """A custom chain gets tensors, unless it asks for something else."""
    net, ((x, y),), kinds = wide(plain, torch.float64), batches(1), []
    optimizer = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, **options)
    tx = optimizer.transformation

    def update(grads, *args, **extra):
        kinds.append(any(isinstance(g, LazyMatrix) for g in grads.values()))
        return tx.update(grads, *args, **extra)

    optimizer.transformation = tx._replace(update=update)
    assert all(isinstance(g, torch.Tensor) for g in optimizer.evaluate(x, y).grads.values())
    optimizer.step()
    optimizer.step(x, y)
    assert kinds == [False, by_rows]


@each_model
@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_between_evaluate_and_step_gradients_are_those_of_the_module(make, scale):
    """They are what autograd says, and what is made of them is what the chain sees, ``clip_by_kl`` included."""
    net, (batch, *_) = make(torch.float64), batches(1)
    other = copy.deepcopy(net)
    torch.nn.functional.cross_entropy(other(batch[0]), batch[1]).backward()
    optimizer = LowRankKFAC(net, lrkfac.categorical(), batch[0], lr=0.2, estimator="exact", **OPTIONS)
    evaluation = optimizer.evaluate(*batch)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad if p.requires_grad else None, rtol=1e-9, atol=1e-12)
        if p.grad is not None:
            p.grad.mul_(scale)
    params, state = optree.tree_map(torch.clone, optimizer.params), optimizer.chain_state
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}
    updates, _ = optimizer.transformation.update(grads, state, params, evaluation=evaluation._replace(grads=grads))
    assert torch.equal(optimizer.step(), evaluation.loss)
    same(optimizer.params, lrkfac.apply_updates(params, updates))


def test_gradients_may_be_changed_in_place_one_by_one():
    """Also where two parameters have the same gradient, for all entries the same number."""

    class Shifted(nn.ParameterDict):
        def __call__(self, x):
            return x + self.one + self.two

    net, x = Shifted({"one": torch.zeros(3), "two": torch.zeros(3)}), torch.randn(4, 3)
    optimizer = LowRankKFAC(net, lrkfac.gaussian(1.0), x, lr=1.0, transformation=descent)
    evaluation = optimizer.evaluate(x, torch.zeros(4, 3))
    grads = {n: g.clone() for n, g in evaluation.grads.items()}
    net.one.grad.mul_(2)
    net.two.grad.add_(1)
    same(evaluation.grads, grads)
    optimizer.step()
    same(optimizer.params, {"one": -2 * grads["one"], "two": -grads["two"] - 1})


def test_three_ways_to_step_are_one():
    """The first of them equals the functional loop."""
    ways = [
        lambda o, x, y: o.step(x, y),
        lambda o, x, y: o.step(lambda: o.evaluate(x, y)),
        lambda o, x, y: o.step(closure=lambda: o.evaluate(x, y)),
        lambda o, x, y: (o.zero_grad(), o.evaluate(x, y), o.step()),
    ]
    data, start = batches(4), normalised(torch.float64)
    nets = [copy.deepcopy(start) for _ in ways]
    for net, step in zip(nets, ways, strict=True):
        optimizer = LowRankKFAC(net, lrkfac.categorical(), data[0][0], lr=0.2, statistics_every=3, **OPTIONS)
        torch.manual_seed(1)
        for x, y in data:
            step(optimizer, x, y)
        same(trained(net), trained(nets[0]))


def test_autocast_is_for_the_model_alone():
    """Under autocast the outputs are in bfloat16; factors and steps are those of the functional loop without it."""
    net, ((x, y),) = plain(torch.float32), batches(1, torch.float32, size=16)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), x, lr=0.2, estimator="exact", **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        evaluation = optimizer.evaluate(x, y)
        assert evaluation.outputs.dtype == torch.bfloat16
        params, state = optree.tree_map(torch.clone, optimizer.params), optimizer.chain_state
        optimizer.step()
    updates, _ = optimizer.transformation.update(evaluation.grads, state, params, evaluation=evaluation)
    same(optimizer.params, lrkfac.apply_updates(params, updates))
