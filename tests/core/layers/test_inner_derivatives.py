"""Derivatives that the model takes of a network, against explicit Jacobians."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

import lrkfac
from lrkfac import LowRankKFAC, evaluator, find_layers, precondition_by_fisher
from lrkfac.core.base.autograd import forgets_derivatives
from lrkfac.structures import full, layer_wise
from tests.core.layers.test_mapped_layers import (
    DAMPING,
    DERIVATIVES,
    N,
    P,
    X,
    after_a_step_by_autograd,
    check_evaluations,
    close,
    explicit,
    flat,
    laplacian,
    net,
    no_layer,
    normal,
    solved,
    step,
    with_gradient,
)


@no_layer
@pytest.mark.parametrize(("model", "reason"), DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_what_no_probe_can_follow_is_uncovered_and_all_else_works(model, reason):
    layers = find_layers(model, P, X)
    assert not len(layers) and len(layers.uncovered) == len(P) and "not covered" in str(layers)
    assert not any("not used by the model" in text for _, text in layers.uncovered)
    reasons = {p.path: text for p, text in layers.uncovered}
    assert reason in reasons["w1"] and reason in reasons["w2"]
    _, gradient = check_evaluations(model, layers)
    close(step(model, layers, full()), 2 * gradient)
    _, targets, _, _ = explicit(model)
    e = evaluator(model, lrkfac.gaussian(), layers)(P, X, targets)
    tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2, kl_clip=1e9, momentum=0.0)
    close(flat(tx.update(e.grads, tx.init(P), P, evaluation=e)[0]), -0.1 * gradient)
    steady = lrkfac.QuadraticModelOptions(start_steps=0.0)  # else a poor first step is undone
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=2, dense_up_to=0, options=steady)
    assert flat(tx.update(e.grads, tx.init(P), P, evaluation=e)[0]) @ gradient < 0
    with pytest.raises(ValueError, match=r"(?s)no layer found; none of the parameters is covered.*w1"):
        find_layers(model, P, X, strict=True)


def test_no_layer_is_a_warning():
    with pytest.warns(UserWarning, match="find_layers: no layer found.*plain gradients"):
        assert not len(find_layers(lambda p, x: x @ p["w"].sin() - p["b"], {"w": normal(2, 2), "b": normal(2)}, X))


def derivative_first(p, x):
    return F.linear(F.linear(laplacian({**p, **Q}, x) * x * p["s"], p["w1"], p["b1"]).tanh(), p["w2"], p["b2"])


def gradient_of_features(p, x):
    """A derivative by what a layer returns: the layer is followed, the network behind it is not."""
    features = F.linear(x * p["s"], p["w1"], p["b1"])
    return vmap(grad(lambda h: (h.tanh() @ p["w2"].T).sum() + p["b2"].sum()))(features)


Q = {"s": normal(2, seed=12), "w1": normal(6, 2, seed=13), "b1": normal(6, seed=14), "w2": normal(1, 6, seed=15),
     "b2": normal(1, seed=16)}  # fmt: skip
MIXED = {
    "constants differentiated": (derivative_first, [["s"], ["w1", "b1"], ["w2", "b2"]]),
    "derivative by features": (gradient_of_features, [["s"], ["w1", "b1"]]),
}


@pytest.mark.parametrize(("model", "blocks"), MIXED.values(), ids=MIXED.keys())
def test_layers_beside_derivatives_are_covered_rightly(model, blocks):
    layers = find_layers(model, P, X)
    covered = {p.path for p in layers.parameters if p.index in layers.covered}
    assert covered == {path for block in blocks for path in block}
    matrix, gradient = check_evaluations(model, layers)
    close(step(model, layers, layer_wise()), solved(matrix, gradient, blocks))
    close(step(model, layers, full()), solved(matrix, gradient, [[path for path in P if path in covered]]))


def test_a_row_that_all_examples_share_beside_a_derivative():
    """With probes, too, the model takes its derivatives by its parameters."""

    def model(p, x, rows=1):
        query = torch.ones(rows, 2, dtype=torch.float64) @ p["q"].T
        return after_a_step_by_autograd({k: p[k] for k in P}, x) * query

    params, y, grads = {**P, "q": normal(3, 2, seed=20)}, normal(N, 3), []
    for one in (model, lambda p, x: model(p, x, len(x))):
        layers = find_layers(one, params, X)
        assert layers.autograd and not layers.independent and [layer.name for layer in layers] == ["q"]
        e = evaluator(one, lrkfac.gaussian(), layers, "empirical")(params, X, y)
        tx = precondition_by_fisher(layers, damping=DAMPING)
        grads.append(tx.update(e.grads, tx.init(params), params, evaluation=e)[0])
    optree.tree_map(close, *grads)


def test_other_parameters_than_those_that_are_differentiated_are_covered():
    def model(p, x):
        return F.linear(x, p["outer"]) * with_gradient(p, x)

    params = {**P, "outer": normal(3, 2, seed=20)}
    layers = find_layers(model, params, X)
    assert [layer.name for layer in layers] == ["outer"]
    assert {p.path for p, _ in layers.uncovered} == set(P)


def test_a_derivative_that_is_a_constant_for_the_gradient_alone_is_refused():
    def model(p, x):
        x = x.requires_grad_()
        value = net(p, x)
        return torch.cat([value, torch.autograd.grad(value.sum(), x, retain_graph=True)[0]], dim=1)

    with pytest.raises(ValueError, match=r"without create_graph=True on what depends on the parameter 'b1'"):
        find_layers(model, P, X)


def test_backward_inside_the_model_is_refused():
    def model(p, x):
        x = x.clone().requires_grad_()
        net(p, x).sum().backward(inputs=[x], create_graph=True)
        return x.grad

    with pytest.raises(ValueError, match=r"backward\(\) adds to .grad of tensors; use torch.autograd.grad"):
        find_layers(model, P, X)


@no_layer
def test_derivatives_by_autograd_stand_in_no_transformation():
    layers = find_layers(with_gradient, P, X)
    evaluate = evaluator(with_gradient, lrkfac.gaussian(), layers)
    targets = normal(N, 3)
    with pytest.raises(ValueError, match=r"outside of torch.compile and torch.func"):
        vmap(lambda p: evaluate(p, X, targets).loss)(optree.tree_map(lambda leaf: leaf[None], P))
    with pytest.raises(ValueError, match=r"differentiable: expected False for a model .*torch.autograd.grad"):
        evaluator(with_gradient, lrkfac.gaussian(), layers, differentiable=True)


@no_layer
def test_derivatives_by_autograd_take_no_graph_along():
    targets = normal(N, 3).requires_grad_()
    params = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), P)
    e = evaluator(with_gradient, lrkfac.gaussian(), find_layers(with_gradient, params, X))(params, X, targets)
    products = e.loss_at(params), e.product(P), e.quadratic(P, P)
    assert not any(x.requires_grad for x in optree.tree_leaves((e.loss, e.grads, e.outputs, products)))


def test_numbers_that_have_no_derivative_are_no_reason_for_autograd():
    assert not find_layers(lambda p, x: (net(p, x), {"count": torch.tensor(3), "signs": x > 0}), P, X).autograd


@no_layer
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derivatives_by_autograd_without_recording_around(mode):
    layers = find_layers(with_gradient, P, X)
    _, targets, gradient, matrix = explicit(with_gradient)
    if mode is torch.inference_mode and forgets_derivatives():
        pytest.skip("derivatives of this torch are zero under torch.inference_mode")
    with mode():
        x = X.clone()
        e = evaluator(with_gradient, lrkfac.gaussian(), layers)(P, x, targets)
        close(flat(e.grads), gradient)
        close(flat(e.product(e.grads)), matrix @ gradient)
        close(e.loss_at(P), e.loss)


class Flux(nn.Module):
    """The gradient of a network by its inputs, as a module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


@no_layer
def test_the_optimizer_steps_a_module_that_takes_derivatives():
    torch.manual_seed(0)
    module, x, targets = Flux().double(), X.clone(), normal(N, 2, seed=1)
    optimizer = LowRankKFAC(module, lrkfac.gaussian(), x, transformation=lrkfac.adaptive_low_rank_kfac)
    other, another = copy.deepcopy((module, optimizer))
    losses = [float(optimizer.step(x, targets)) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0] and [float(another.step(x, targets)) for _ in range(5)] == losses
    optimizer.evaluate(x, targets)
    assert not x.requires_grad
    (other(x) - targets).square().sum(1).mean().div(2).backward()
    *weights, bias = module.parameters()
    for p, q in zip(weights, other.parameters(), strict=False):
        close(p.grad, q.grad)
    assert not bias.grad.any()  # the outermost bias adds nothing to the derivative
