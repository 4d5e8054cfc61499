"""``differentiable=True`` and ``torch.func`` follow updates by parameters and hyperparameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vmap

import lrkfac
from tests.tensors import close, normal
from tests.test_graph_growth import CHAINS, EVALUATE, INPUTS, LAYERS, MODEL, NET, TARGETS, nodes, step, tensors

ASKED = lrkfac.evaluator(MODEL, lrkfac.categorical(), LAYERS, "exact", differentiable=True)
OTHERS = INPUTS.flip(0) + 0.1
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}
DIRECTION = {name: normal(*p.shape, seed=3 + i) for i, (name, p) in enumerate(PARAMS.items())}


def loss_after(tx, evaluate=EVALUATE, steps=2):
    """The loss of other examples and a norm of the averages after some steps, as a function of the parameters."""

    def loss(params):
        state = tx.init(params)
        for _ in range(steps):
            params, state, _ = step(evaluate, tx, params, state)
        averages = [s.average for s in state if hasattr(s, "average")] if isinstance(state, tuple) else []
        penalty = sum(x.square().sum() for x in tensors(averages))
        return F.cross_entropy(MODEL(params, OTHERS), TARGETS) + penalty

    return loss


FOLLOWED = {
    "kfac": lrkfac.kfac(LAYERS, 0.1, weight_decay=0.3, damping=0.3, kl_clip=10.0),
    "decay and average": CHAINS["ema"],
    "adam": CHAINS["adam"],
}
each_followed = pytest.mark.parametrize("tx", FOLLOWED.values(), ids=FOLLOWED.keys())


def requiring(params=PARAMS):
    return {name: p.clone().requires_grad_() for name, p in params.items()}


def along(gradient):
    return sum((gradient[name] * DIRECTION[name]).sum() for name in DIRECTION)


@each_followed
def test_backward_goes_through_an_update_where_it_is_asked_to(tx):
    """As ``torch.func.grad`` does without being asked, through gradients, weight decay and averages; also in vmap."""
    expected = [torch.func.grad(loss_after(tx))({name: f * p for name, p in PARAMS.items()}) for f in (1.0, 0.9)]
    assert all(x.abs().max() > 1e-6 for x in expected[0].values())
    leaves = requiring()
    loss = loss_after(tx, ASKED)(leaves)
    assert nodes(loss) > 50
    loss.backward()
    close({name: p.grad for name, p in leaves.items()}, expected[0])
    many = requiring({name: torch.stack([p, 0.9 * p]) for name, p in PARAMS.items()})
    vmap(loss_after(tx, ASKED))(many).sum().backward()
    for i in (0, 1):
        close({name: p.grad[i] for name, p in many.items()}, expected[i])


@each_followed
def test_transformations_of_torch_func_differentiate_either_way(tx):
    """``grad``, ``jvp`` and ``vmap`` of both, also of parameters that require gradients: one derivative, which finite
    differences confirm where factors are no part of it.
    """
    loss = loss_after(tx)
    expected = along(torch.func.grad(loss)(PARAMS))
    for function in (loss, loss_after(tx, ASKED)):
        for at in (PARAMS, requiring()):
            found = [along(torch.func.grad(function)(at)), jvp(function, (at,), (DIRECTION,))[1]]
            many = {name: torch.stack([p, p]) for name, p in at.items()}
            mapped = torch.func.grad(lambda p, f=function: vmap(f)(p).sum())(many)
            found += [along({name: g[i] for name, g in mapped.items()}) for i in (0, 1)]
            close(torch.stack(found), expected.expand(4))
    if tx is FOLLOWED["adam"]:  # without statistics, of which factors would be made anew
        at = lambda t: loss({name: p + t * DIRECTION[name] for name, p in PARAMS.items()}).detach()  # noqa: E731
        differences = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 12e-4
        torch.testing.assert_close(expected, differences, rtol=1e-5, atol=1e-7)


def test_products_are_followed_where_it_is_asked():
    params = requiring()
    curvature = ASKED(params, INPUTS, TARGETS).quadratic(DIRECTION, DIRECTION)
    found = torch.autograd.grad(curvature, list(params.values()))
    expected = torch.func.grad(lambda p: EVALUATE(p, INPUTS, TARGETS).quadratic(DIRECTION, DIRECTION))(params)
    close(found, tuple(expected.values()))
    loss = ASKED(params, INPUTS, TARGETS).loss_at(params)
    assert loss.requires_grad and not EVALUATE(params, INPUTS, TARGETS).loss_at(params).requires_grad


def test_a_hyperparameter_that_requires_a_gradient_asks_for_it():
    """One update is followed by its learning rate, whatever the evaluator; the parameters before it count, too."""
    params = requiring()

    def loss(rate):
        tx = lrkfac.kfac(LAYERS, rate, weight_decay=0.3, kl_clip=10.0)
        return F.cross_entropy(MODEL(step(EVALUATE, tx, params, tx.init(params))[0], OTHERS), TARGETS)

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss(rate).backward()
    close(rate.grad, torch.func.grad(loss)(rate.detach()))
    assert rate.grad.abs() > 1e-3


def test_an_evaluator_remembers_whether_it_is_asked():
    """Where it is not, a backward pass fails and says so."""
    assert ASKED.differentiable and not EVALUATE.differentiable and ASKED != EVALUATE
    params = requiring()
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_after(CHAINS["low_rank_kfac"])(params).backward()
    assert copy.copy(ASKED)(params, INPUTS, TARGETS).loss.requires_grad
    with torch.no_grad():
        assert not ASKED(params, INPUTS, TARGETS).loss.requires_grad


@pytest.mark.parametrize("over", [lambda f: f, lambda f: lambda p: vmap(f)({k: x[None] for k, x in p.items()}).sum()])
def test_torch_func_differentiates_by_the_parameters_also_where_updates_are_constants(over):
    """Weight decay, averages and the sum itself, with the updates of another step."""
    tx = lrkfac.chain(lrkfac.add_decayed_weights(0.5), lrkfac.ema_params(0.0))

    def loss(params):
        updates, state = tx.update(DIRECTION, tx.init(params), params)
        moved = lrkfac.apply_updates(params, updates)
        return along({name: moved[name] + state[1].average[name] for name in params})

    expected = {name: 2 * 1.5 * x for name, x in DIRECTION.items()}
    close(torch.func.grad(over(loss))(PARAMS), expected)
    close(jvp(over(loss), (PARAMS,), (DIRECTION,))[1], along(expected))
