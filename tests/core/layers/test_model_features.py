"""What models of the ecosystem bring along besides layers: each works with the right values, or is refused by name."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lrkfac
from lrkfac import LowRankKFAC, evaluator, find_layers, from_module, precondition_by_fisher
from lrkfac.core.base.private_torch import fake_mode
from lrkfac.structures import layer_wise

DAMPING = 0.1
LOGGER = "torch._subclasses.fake_tensor"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(6, 4, seed=9)


def graph(p, i):
    return (i["adjacency"] @ i["x"] @ p["w"]).tanh() @ p["o"]


GRAPH = {"w": torch.ones(3, 4), "o": torch.ones(4, 2)}
NODES = {"x": torch.ones(5, 3), "adjacency": torch.eye(5)}


def test_runs_without_values_do_not_log_the_exceptions_that_they_handle(caplog):
    """With every input twice as long, the product with the adjacency matrix fails."""
    with caplog.at_level(logging.DEBUG, LOGGER):
        layers = find_layers(graph, GRAPH, NODES)
        assert not layers.uncovered and not caplog.records
        with pytest.raises(RuntimeError, match="same reduction dim"), fake_mode():
            torch.ones(2, 3) @ torch.ones(2, 3)
        assert not caplog.records
        logging.getLogger(LOGGER).error("of other users of torch")
    assert [record.getMessage() for record in caplog.records] == ["of other users of torch"]


class Sign(Function):
    """A straight-through estimator as it was written before ``torch.func``."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class SplitSign(Function):
    """Without forward derivative and rule for ``vmap``."""

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class WholeSign(SplitSign):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


class Product(Function):
    """A linear layer that saves what it needs."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x


class Hidden(Function):
    """One that calls no function of torch on its weight."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
            return x @ w.T

    backward = Product.backward


class Net(nn.Module):
    """Three layers, the middle one in the hands of ``around``."""

    def __init__(self, around):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.around = around

    def forward(self, x):
        return self.c(self.around(self, self.a(x).tanh()))


def on_cpu(net, h):
    """Saved tensors elsewhere, as ``save_on_cpu`` does."""
    with saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        return net.b(h).tanh()


def old_product(net, h):
    return F.linear(Product.apply(h, net.b.weight), torch.eye(4).to(h), net.b.bias)


WORKING = {
    "checkpoint": (lambda net, h: checkpoint(lambda h: net.b(h).tanh(), h, use_reentrant=False), {"a", "b", "c"}),
    "reentrant checkpoint": (
        lambda net, h: checkpoint(lambda h: net.b(h).tanh(), h, use_reentrant=True), {"a", "b", "c"}),
    "module under checkpoint": (
        lambda net, h: checkpoint(net.b, h, use_reentrant=False).tanh(), {"a", "b", "c"}),
    "hooks on saved tensors": (on_cpu, {"a", "b", "c"}),
    "old function": (lambda net, h: net.b(Sign.apply(h)), {"a", "b", "c"}),
    "function with setup_context": (lambda net, h: net.b(SplitSign.apply(h)), {"a", "b", "c"}),
    "function with all rules": (lambda net, h: net.b(WholeSign.apply(h)), {"a", "b", "c"}),
    "old function of a weight": (
        lambda net, h: F.linear(h, Sign.apply(net.b.weight), net.b.bias), {"a", "b.bias", "c"}),
    "function of a weight": (
        lambda net, h: F.linear(h, SplitSign.apply(net.b.weight), net.b.bias), {"a", "b.bias", "c"}),
    "old function that is a layer": (old_product, {"a", "b.bias", "c"}),
    "function that shows nothing": (
        lambda net, h: F.linear(Hidden.apply(h, net.b.weight), torch.eye(4).to(h), net.b.bias), {"a", "b.bias", "c"}),
    "function under checkpoint": (
        lambda net, h: checkpoint(lambda h: net.b(Sign.apply(h)), h, use_reentrant=False), {"a", "b", "c"}),
    "hook on an activation": (lambda net, h: hooked(net.b(h)).tanh(), {"a", "b", "c"}),
}  # fmt: skip


def hooked(x):
    if x.requires_grad:
        x.register_hook(lambda g: 3 * g)
    return x


def flat(tree):
    return torch.cat([leaf.flatten() for leaf in tree.values()])


def close(x, expected):
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


def by_autograd(net):
    """Targets, gradient and Fisher matrix of a Gaussian likelihood."""
    leaves, outputs = list(net.parameters()), net(X)
    rows = [torch.autograd.grad(f, leaves, retain_graph=True, materialize_grads=True) for f in outputs.flatten()]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    targets = normal(*outputs.shape, seed=3)
    return targets, J.mT @ (outputs.detach() - targets).flatten() / len(X), J.mT @ J / len(X)


@pytest.mark.parametrize(("around", "covered"), WORKING.values(), ids=WORKING.keys())
def test_checkpoints_and_custom_functions_are_as_by_autograd(around, covered):
    """At other parameters than the module's, since a checkpoint could call the module again, with these."""
    torch.manual_seed(0)
    model, start = from_module(Net(around).double())
    layers = find_layers(model, start, X)
    assert {layer.name for layer in layers} == covered
    assert all("Function" in reason for p, reason in layers.uncovered if p.path == "b.weight")
    # Torch's own reentrant checkpoint takes no part in torch.autograd.grad.
    other = Net(WORKING["checkpoint"][0] if around is WORKING["reentrant checkpoint"][0] else around).double()
    params = {name: p.detach().clone() for name, p in other.named_parameters()}
    targets, gradient, matrix = by_autograd(other)
    for estimator in ("exact", "mc", "empirical", "forward_only"):
        for statistics in (True, False):
            e = evaluator(model, lrkfac.gaussian(), layers, estimator)(params, X, targets, statistics=statistics)
            close(flat(e.grads), gradient)
    close(e.loss_at(params), e.loss)
    sizes = [p.numel() for p in params.values()]
    if around is not WORKING["hook on an activation"][0]:  # which forward derivatives do not see
        u = normal(len(gradient), seed=4)
        tangent = {k: x.reshape(params[k].shape) for k, x in zip(params, u.split(sizes), strict=True)}
        close(flat(e.product(tangent)), matrix @ u)
        close(e.quadratic(tangent, e.grads), u @ matrix @ gradient)
    e = evaluator(model, lrkfac.gaussian(), layers, "exact")(params, X, targets)
    tx = precondition_by_fisher(layers, layer_wise(), damping=DAMPING)
    natural, place = gradient.clone(), dict(zip(params, torch.arange(len(gradient)).split(sizes), strict=True))
    for name in covered:
        i = torch.cat([place[path] for path in params if path.startswith(name)])
        natural[i] = torch.linalg.solve(matrix[i[:, None], i] + DAMPING * torch.eye(len(i)).to(matrix), gradient[i])
    close(flat(tx.update(e.grads, tx.init(params), params, evaluation=e)[0]), natural)


def test_checkpoints_work_again_after_an_evaluation():
    calls = []
    net = Net(lambda net, h: checkpoint(lambda h: calls.append(1) or net.b(h), h, use_reentrant=False)).double()
    optimizer = LowRankKFAC(net, lrkfac.categorical(), X, lr=0.1, rank=2)
    calls.clear()
    optimizer.step(X, torch.arange(6) % 2)
    once = len(calls)
    net(X).sum().backward()
    assert len(calls) == once + 2


def test_the_optimizer_takes_an_old_function():
    torch.manual_seed(0)
    net = Net(lambda net, h: net.b(Sign.apply(h))).double()
    targets = torch.arange(6) % 2
    for transformation, lr in ((lrkfac.low_rank_kfac, 0.05), (lrkfac.adaptive_low_rank_kfac, None)):
        optimizer = LowRankKFAC(net, lrkfac.categorical(), X, lr=lr, rank=2, transformation=transformation)
        losses = [float(optimizer.step(X, targets)) for _ in range(5)]
        assert losses[-1] < losses[0]
