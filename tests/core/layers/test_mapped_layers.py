"""Layers inside ``torch.func.vmap`` within the model: those of a batch; and what all derivatives within it share."""

from functools import cache

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import lrkfac
from lrkfac import evaluator, find_layers, precondition_by_fisher
from lrkfac.structures import full, kronecker, layer_wise, low_rank

DAMPING = 0.1


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


P = {"b1": normal(6), "b2": normal(1, seed=1), "s": normal(2, seed=2), "w1": normal(6, 2, seed=3),
     "w2": normal(1, 6, seed=4)}  # fmt: skip
X = normal(5, 2, seed=9)
N, SIZES = len(X), [leaf.numel() for leaf in P.values()]


def net(p, x):
    return F.linear(F.linear(x * p["s"], p["w1"], p["b1"]).tanh(), p["w2"], p["b2"])


def with_gradient(p, x):
    """A value and its derivative by the points, as most physics-informed losses have them."""
    x.requires_grad_()
    value = net(p, x)
    return torch.cat([value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]], dim=1)


def laplacian(p, x):
    x = x.requires_grad_()
    (by_x,) = torch.autograd.grad(net(p, x).sum(), x, create_graph=True)
    each = [torch.autograd.grad(by_x[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return torch.stack(each).sum(0)[:, None]


def of_dual(p, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(p, forward_ad.make_dual(x, x.cos()))).tangent


def after_a_step(p, x):
    steps = grad(lambda p: net(p, x).square().mean())(p)
    return net({k: p[k] - 0.1 * steps[k] for k in p}, x)


def after_a_step_by_autograd(p, x):
    gradients = torch.autograd.grad(net(p, x).square().mean(), list(p.values()), create_graph=True)
    return net({k: v - 0.1 * g for (k, v), g in zip(p.items(), gradients, strict=True)}, x)


BATCHED = {
    "rows": lambda p, x: vmap(lambda row: net(p, row))(x),
    "columns": lambda p, x: vmap(lambda column: net(p, column), in_dims=1)(x.T),
    "weights in front": lambda p, x: vmap(
        lambda row: p["w2"] @ (torch.mv(p["w1"], row * p["s"]) + p["b1"]).tanh() + p["b2"])(x),
    "weights behind": lambda p, x: vmap(
        lambda row: ((row * p["s"]) @ p["w1"].T + p["b1"]).tanh() @ p["w2"].T + p["b2"])(x),
}  # fmt: skip
DERIVATIVES = {
    "grad": (lambda p, x: grad(lambda x: net(p, x).sum())(x), "torch.func.grad"),
    "grad of each": (lambda p, x: vmap(grad(lambda row: net(p, row).sum()))(x), "torch.func.grad"),
    "jvp": (lambda p, x: jvp(lambda x: net(p, x), (x,), (x.cos(),))[1], "torch.func.jvp"),
    "vjp": (lambda p, x: vjp(lambda x: net(p, x), x)[1](x[:, :1])[0], "torch.func.grad"),
    "jacfwd": (lambda p, x: vmap(jacfwd(lambda row: net(p, row)))(x)[:, 0], "torch.func.jvp"),
    "hessian": (lambda p, x: vmap(hessian(lambda row: net(p, row)[0]))(x).flatten(1), "torch.func.grad"),
    "value and gradient": (with_gradient, "torch.autograd.grad"),
    "Laplacian": (laplacian, "torch.autograd.grad"),
    "dual numbers": (of_dual, "torch.autograd.forward_ad"),
    "inner step": (after_a_step, ""),
    "inner step by autograd": (after_a_step_by_autograd, "torch.autograd.grad"),
    "vmap over parameters": (
        lambda p, x: vmap(lambda p: net(p, x))(optree.tree_map(lambda leaf: leaf[None], p))[0], ""),
    "chunks": (lambda p, x: vmap(lambda row: net(p, row), chunk_size=2)(x), "what all examples share"),
    "constants inside vmap": (
        lambda p, x: vmap(lambda row: row.sum() * net(p, torch.ones(2, dtype=row.dtype)))(x), "does not depend on"),
}  # fmt: skip
no_layer = pytest.mark.filterwarnings("ignore:find_layers. no layer found")


def flat(tree):
    return torch.cat([tree[k].flatten() for k in P])


def unflatten(x):
    return {k: part.reshape(P[k].shape) for k, part in zip(P, x.split(SIZES), strict=True)}


@cache
def explicit(model):
    """Outputs, targets, gradient and Fisher matrix of a Gaussian likelihood, by ``torch.autograd`` alone."""
    leaves = [leaf.clone().requires_grad_() for leaf in P.values()]
    outputs = model(dict(zip(P, leaves, strict=True)), X.clone())
    rows = [torch.autograd.grad(f, leaves, retain_graph=True, materialize_grads=True) for f in outputs.flatten()]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    outputs = outputs.detach()
    targets = normal(*outputs.shape, seed=7)
    return outputs, targets, J.mT @ (outputs - targets).flatten() / N, J.mT @ J / N


def close(x, expected):
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


def check_evaluations(model, layers):
    """Gradient, loss, products and a step with a fallback, with each estimator and without statistics."""
    outputs, targets, gradient, matrix = explicit(model)
    params, x = optree.tree_map(torch.clone, (P, X))
    for estimator in ("exact", "mc", "empirical", "forward_only"):
        evaluate = evaluator(model, lrkfac.gaussian(), layers, estimator)
        for more in ({}, {"statistics": False}, {"examples": torch.tensor([1, 3])})[: 3 if estimator == "exact" else 1]:
            e = evaluate(params, x, targets, **more)
            close(flat(e.grads), gradient)
            close(e.outputs, outputs)
    with torch.no_grad():
        close(e.loss_at(params), e.loss)
    assert not x.requires_grad and torch.equal(x, X) and not any(leaf.requires_grad for leaf in params.values())
    u, v = normal(sum(SIZES), seed=5), normal(sum(SIZES), seed=6)
    close(flat(e.product(unflatten(u))), matrix @ u)
    close(e.quadratic(unflatten(u), unflatten(v)), u @ matrix @ v)
    stacked = torch.stack([u, v])
    close(e.gram(vmap(unflatten)(stacked)), stacked @ matrix @ stacked.mT)
    assert not any(x.requires_grad for x in optree.tree_leaves((e.loss, e.grads, e.outputs)))
    return matrix, gradient


def solved(matrix, gradient, paths):
    """``(F + λ I)⁻¹ g`` for each block of parameters, and twice the other gradients."""
    natural, place = 2 * gradient, unflatten(torch.arange(sum(SIZES)))
    for block in paths:
        i = torch.cat([place[k].flatten() for k in block])
        natural[i] = torch.linalg.solve(matrix[i[:, None], i] + DAMPING * torch.eye(len(i)).to(matrix), gradient[i])
    return natural


def step(model, layers, structure):
    _, targets, _, _ = explicit(model)
    e = evaluator(model, lrkfac.gaussian(), layers, "exact")(P, X, targets)
    tx = precondition_by_fisher(layers, structure, damping=DAMPING, fallback=lrkfac.scale(2.0))
    return flat(tx.update(e.grads, tx.init(P), P, evaluation=e)[0])


@pytest.mark.parametrize("model", BATCHED.values(), ids=BATCHED.keys())
def test_layers_inside_vmap_are_those_of_the_batch(model):
    layers = find_layers(model, P, X, strict=True)
    batch = find_layers(net, P, X)
    assert [(x.name, x.kind, x.d_in, x.d_out, x.by_example) for x in layers] == [
        (x.name, x.kind, x.d_in, x.d_out, True) for x in batch
    ]
    matrix, gradient = check_evaluations(model, layers)
    close(step(model, layers, full()), solved(matrix, gradient, [list(P)]))
    close(step(model, layers, layer_wise()), solved(matrix, gradient, [["s"], ["w1", "b1"], ["w2", "b2"]]))
    for structure in (None, kronecker(low_rank(2), low_rank(3), treatment="reduce", corrected=True)):
        close(step(model, layers, structure), step(net, batch, structure))


class Pictures(nn.Module):
    """One picture at a time."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.second, self.last = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 3)
        self.embedding = nn.Embedding(7, 3)

    def forward(self, picture, number):
        x = self.norm(self.first(picture)).relu()
        return self.last(self.second(x).flatten(2).mT.relu()) * self.embedding(number)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("structure", [None, layer_wise(), full()], ids=["default", "layer_wise", "full"])
def test_a_module_of_one_example_equals_that_of_a_batch(structure):
    torch.manual_seed(0)
    module = Pictures().double()
    params = {k: p.detach() for k, p in module.named_parameters()}
    inputs, targets = (normal(6, 2, 5, 5), torch.arange(6)), normal(6, 9, 3, seed=3)

    def mapped(p, inputs):
        return vmap(lambda picture, number: functional_call(module, p, (picture[None], number[None]))[0])(*inputs)

    def batch(p, inputs):
        picture, number = inputs
        x = F.group_norm(F.conv2d(picture, p["first.weight"], p["first.bias"], padding=1), 2, p["norm.weight"],
                         p["norm.bias"]).relu()  # fmt: skip
        x = F.conv2d(x, p["second.weight"], p["second.bias"], groups=2).flatten(2).mT.relu()
        return F.linear(x, p["last.weight"], p["last.bias"]) * F.embedding(number, p["embedding.weight"])[:, None]

    updates = []
    for model in (mapped, batch):
        layers = find_layers(model, params, inputs, strict=True)
        e = evaluator(model, lrkfac.gaussian(), layers, "exact")(params, inputs, targets)
        tx = precondition_by_fisher(layers, structure, damping=DAMPING)
        updates.append(tx.update(e.grads, tx.init(params), params, evaluation=e)[0])
    for k in params:
        close(lrkfac.materialize(updates[0])[k], lrkfac.materialize(updates[1])[k])


EINSUMS = {"a row": ("i,oi->o", (4,)), "rows behind": ("ti,oi->ot", (2, 4)), "columns": ("it,oi->to", (4, 2))}


@pytest.mark.parametrize(("equation", "shape"), EINSUMS.values(), ids=EINSUMS.keys())
def test_einsum_inside_vmap(equation, shape):
    """The axes that it turns are behind the mapped one."""
    mapped = lambda p, x: vmap(lambda row: torch.einsum(equation, row, p["w"]).reshape(-1))(x)  # noqa: E731
    of_input, _, of_output = equation.replace("->", ",").split(",")
    whole = f"n{of_input},oi->n{of_output}"
    plain = lambda p, x: torch.einsum(whole, x, p["w"]).flatten(1)  # noqa: E731
    x, p, steps = normal(5, *shape), {"w": normal(3, 4)}, []
    y = normal(*plain(p, x).shape, seed=1)
    for model in (mapped, plain):
        layers = find_layers(model, p, x, strict=True)
        assert layers["w"].by_example
        e = evaluator(model, lrkfac.gaussian(), layers, "exact")(p, x, y)
        tx = precondition_by_fisher(layers, full(), damping=DAMPING)
        steps.append(tx.update(e.grads, tx.init(p), p, evaluation=e)[0]["w"])
    close(*steps)
    jacobian = jacrev(lambda p: plain(p, x))(p)["w"].flatten(0, 1).flatten(1)
    F_ = jacobian.mT @ jacobian / N + DAMPING * torch.eye(12).to(x)
    close(steps[0].flatten(), torch.linalg.solve(F_, jacobian.mT @ (plain(p, x) - y).flatten() / N))


@pytest.mark.parametrize("positions", [3, 4])
def test_vmap_over_positions_is_a_sequence(positions):
    """Also of as many positions as there are examples: lengths decide nothing."""
    x, y = normal(4, positions, 2), normal(4, 1, seed=1)
    mapped = lambda p, x: vmap(lambda rows: net(p, rows), in_dims=1)(x).sum(0)  # noqa: E731
    plain = lambda p, x: net(p, x).sum(1)  # noqa: E731
    for structure in (None, full(), layer_wise(), kronecker(low_rank(2), low_rank(3), treatment="reduce")):
        steps = []
        for model in (mapped, plain):
            layers = find_layers(model, P, x, strict=True)
            e = evaluator(model, lrkfac.gaussian(), layers, "exact")(P, x, y)
            tx = precondition_by_fisher(layers, structure, damping=DAMPING)
            steps.append(flat(tx.update(e.grads, tx.init(P), P, evaluation=e)[0]))
        close(*steps)


def test_what_all_examples_share_inside_vmap_is_no_layer():
    """One point or several of a grid."""
    for grid in (normal(1, 2), normal(3, 2)):
        model = lambda p, x, grid=grid: net(p, x) * vmap(lambda row: row @ p["other"].T)(grid).sum()  # noqa: E731
        params = {**P, "other": normal(3, 2)}
        layers = find_layers(model, params, X)
        assert [(p.path, text) for p, text in layers.uncovered] == [
            ("other", "used by linear on what all examples share, without an axis for the batch")
        ]
        y = normal(N, 1, seed=3)
        e = evaluator(model, lrkfac.gaussian(), layers)(params, X, y)
        expected = grad(lambda p: (model(p, X) - y).square().sum() / (2 * N))(params)  # noqa: B023
        optree.tree_map(close, e.grads, expected)


def test_a_custom_kind_inside_vmap_is_no_layer():
    product = lrkfac.LayerKind("product", lambda x, w: x @ w.mT, lambda a, w: a @ w.mT)
    layers = find_layers(lambda p, x: net(p, vmap(lambda row: product(row, p["c"]))(x)), {**P, "c": normal(2, 2)}, X,
                         kinds=(product,))  # fmt: skip
    assert [(p.path, text) for p, text in layers.uncovered] == [("c", f"used by {product} inside vmap")]


def test_vmap_within_vmap():
    """Points of several solutions: both axes in front, as in ``[N, T, 2]``."""
    x = normal(3, 4, 2)
    layers = find_layers(lambda p, x: vmap(vmap(lambda row: net(p, row)))(x), P, x, strict=True)
    model = lambda p, x: vmap(vmap(lambda row: net(p, row)))(x)  # noqa: E731
    y, steps = normal(3, 4, 1, seed=8), []
    for f, described in ((model, layers), (net, find_layers(net, P, x))):
        e = evaluator(f, lrkfac.gaussian(), described, "exact")(P, x, y)
        tx = precondition_by_fisher(described, layer_wise(), damping=DAMPING)
        steps.append(flat(tx.update(e.grads, tx.init(P), P, evaluation=e)[0]))
    close(*steps)


def test_an_ensemble_of_networks_inside_vmap():
    """The function of ``evaluator`` inside vmap, with the model's vmap within it."""
    model = BATCHED["rows"]
    layers = find_layers(model, P, X)
    evaluate = evaluator(model, lrkfac.gaussian(), layers, "exact")
    members = optree.tree_map(lambda leaf: torch.stack([leaf, 0.5 * leaf]), P)
    y = normal(N, 1, seed=8)

    def natural(p):
        e = evaluate(p, X, y)
        tx = precondition_by_fisher(layers, layer_wise(), damping=DAMPING)
        return flat(tx.update(e.grads, tx.init(p), p, evaluation=e)[0])

    each = torch.stack([natural(optree.tree_map(lambda leaf, i=i: leaf[i], members)) for i in range(2)])
    close(vmap(natural)(members), each)
