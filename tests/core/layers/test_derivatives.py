"""Derivatives that go through a network: equal to nested ones of torch.func, and seen by the capture."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jacrev, vmap

import lrkfac
from lrkfac import derivatives, evaluator, find_layers, from_module, laplacian, precondition_by_fisher
from lrkfac.core.layers.jet_functions import ACTIVATIONS, ELEMENTWISE
from lrkfac.core.layers.jets import Jet
from lrkfac.structures import full

PAIRS = [(0, 0), (0, 1), ((1, 1), (2, 0), (0, 0)), (2, 2)]
X = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
C = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
V, M = C[0, :3], C[:, :3] + 0.2
INTEGERS = torch.tensor([2, 0])


def check(network, x=X, params=()):
    """Value, gradient and second derivatives, and the Laplacian, of a function of points."""

    def one(point):
        return network(params, point[None])[0]

    first, second = vmap(jacrev(one))(x), vmap(jacrev(jacrev(one)))(x)
    rows = [sum(second[..., i, j] for i, j in ([p] if isinstance(p[0], int) else p)) for p in PAIRS]
    found = derivatives(network, PAIRS)(params, x)
    torch.testing.assert_close(found, (network(params, x), first, torch.stack(rows, -1)), rtol=1e-12, atol=1e-12)
    expected = second.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(laplacian(network)(params, x), expected, rtol=1e-12, atol=1e-12)
    gradient_alone = derivatives(network)(params, x)
    torch.testing.assert_close(gradient_alone.gradient, first, rtol=1e-12, atol=1e-12)
    assert gradient_alone.second.shape == (*first.shape[:-1], 0)


BINARY = {"pow": 3.0, "__pow__": 2, "__rpow__": 2.0, "float_power": 1.5} | dict.fromkeys(
    ("maximum", "minimum", "atan2", "arctan2", "hypot", "logaddexp", "xlogy"), V.abs() + 0.3
)
BOUNDS = {"clamp": (0.3, 0.5), "clip": (0.3, 0.5), "clamp_min": (0.5,), "clamp_max": (0.5,)}


@pytest.mark.parametrize("place", [torch, torch.Tensor, F], ids=["torch", "method", "functional"])
def test_elementwise_functions(place):
    names = [name for name in (ACTIVATIONS if place is F else ELEMENTWISE) if hasattr(place, name)]

    def all_of_them(_, x):
        y = x @ M.abs() * 0.4
        shifted = {name: y + 1 if "cosh" in name else y for name in names}
        more = {name: BOUNDS.get(name, (BINARY[name],) if name in BINARY else ()) for name in names}
        return torch.stack([getattr(place, name)(shifted[name], *more[name]) for name in names], dim=1)

    check(all_of_them, X[:2])


NETWORKS = {
    "arithmetic of jets": lambda _, x: (x[:, :1] * x[:, 1:2] - 2 * x[:, 2:] + 1) / (x[:, :1] + 3) - 1 / x[:, 1:2],
    "constants": lambda _, x: 1 - (V - x * V + x / V + V / x + (x - V) + torch.sub(x, V, alpha=2)).square(),
    "more axes than the jet": lambda _, x: (x.sum(-1) + C[:, :1, None] * x.sum(-1)).movedim(-1, 0).square(),
    "different axes": lambda _, x: (x[:, :, None] * x.sin()[:, None] + x.sin()[:, None, :]).square(),
    "rearrangements": lambda _, x: torch.cat(
        [
            x.T.flip(0).T,
            x.unsqueeze(1).expand(-1, 2, -1).flatten(1),
            x.roll(1, -1)[:, INTEGERS],
            x[..., None].squeeze(-1),
        ],
        dim=1,
    ).square(),
    "parts": lambda _, x: torch.stack([x.unbind(-1)[0] * x.chunk(3, -1)[1][:, 0], x[:, 2] ** 2, *x.T.square()], -1),
    "beside constants": lambda _, x: torch.cat([x.square(), torch.ones_like(x), x.new_zeros(len(x), 1)], -1).sin(),
    "stacked with a constant": lambda _, x: torch.stack([x.square(), torch.ones_like(x)], 1).sin(),
    "a choice": lambda _, x: torch.where(x > 0.5, x.sin(), 2.0) + torch.where(x[:, :1] < 0.5, x.cos(), M),
    "a chosen method": lambda _, x: x.sin().where(x.detach() > 0.5, x.square()),
    "reductions": lambda _, x: torch.stack([x.square().sum(-1), x.exp().mean(dim=1), x.norm(dim=-1)], -1),
    "softmax": lambda _, x: torch.cat([x.softmax(-1), F.log_softmax(3 * x, -1), x.logsumexp(-1, keepdim=True)], -1),
    "layer_norm": lambda _, x: F.layer_norm(x @ C, (4,), C[0], C[1]) + F.rms_norm(x @ C, (4,), C[0]),
    "normalize": lambda _, x: F.normalize(x, dim=-1) + x / torch.linalg.norm(x, dim=-1, keepdim=True),
    "products": lambda _, x: (x @ C + torch.matmul(x, C) + torch.addmm(C[0], x, C) + x.mm(C)).square(),
    "products from the left": lambda _, x: (C.T @ x.T).T.square() + (C.T @ x.T).mT.sin(),
    "a vector": lambda _, x: (x @ V).square(),
    "a product of jets": lambda _, x: (x[:, :, None] @ x.sin()[:, None, :]) @ x.cos()[:, :, None],
    "stacks of matrices": lambda _, x: x[:, None, :] @ torch.stack([C, C.sin(), C.cos()])[:1] * x[:, :1, None],
    "einsum": lambda _, x: (
        torch.einsum("ni,ij->nj", x, C).square() + torch.einsum("ni,nj->nij", x, x).sum(1, True)[..., 0]
    ),
    "two jets in one function": lambda _, x: (
        torch.atan2(x, x.roll(1, -1)) + torch.hypot(x, x.sin()) + x ** x.roll(1, -1)
    ),
    "shapes": lambda _, x: x.square().reshape(x.shape[0], -1) * x.size(-1) / x.ndim,
    "in float32 for a while": lambda _, x: x.to(torch.float64).double().square(),
    "augmented": lambda _, x: x * 2 + x.clamp(min=0.4) ** 3,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_functions(name):
    check(NETWORKS[name])


def parameters(*shapes):
    generator = torch.Generator().manual_seed(1)
    names = ("w", "b", "v", "c", "s", "q")
    return {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in zip(names, shapes, strict=False)}


LAYERED = {
    "linear": lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"], p["c"]),
    "products and sums": lambda p, x: torch.sin(x @ p["w"].T + p["b"]) @ p["v"].T + p["c"],
    "from the left": lambda p, x: (p["v"] @ (p["w"] @ x.T).sin()).T + p["c"] + p["b"].sum() * 0,
    "one point": lambda p, x: p["v"] @ F.gelu(p["w"] @ x + p["b"]) + p["c"],
    "one bias of two weights": lambda p, x: F.linear(F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["q"], p["b"]).sin(),
        p["v"], p["c"]),
    "in two places": lambda p, x: F.linear(F.linear(F.linear(x, p["w"], p["b"]).tanh()[:, :2], p["w"], p["b"]).sin(),
        p["v"], p["c"]),
    "scaled and shifted": lambda p, x: F.linear(normalized(x @ p["w"].T, (4,), p["s"], p["b"]).tanh(), p["v"], p["c"]),
}  # fmt: skip


EXTRA = {("s", "scaled and shifted"), ("q", "one bias of two weights")}


def normalized(x, shape, scale, shift):
    """``F.layer_norm``, of which torch has wrong third derivatives."""
    if isinstance(x, Jet):
        return F.layer_norm(x, shape, scale, shift)
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift


def laplacian_of(name):
    """By torch.func alone."""
    network = LAYERED[name]

    def of_one(params, point):
        second = jacrev(jacrev(lambda x: network(params, x) if name == "one point" else network(params, x[None])[0]))(
            point
        )
        return second.diagonal(dim1=-2, dim2=-1).sum(-1)

    return vmap(of_one, (None, 0))


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("name", LAYERED)
def test_layers_within_are_exact(name, bias):
    network, x = LAYERED[name], X[:, :2]
    p = parameters((4, 2), (4,), (2, 4), (2,), (4,), (4, 4))
    model = vmap(laplacian(network), (None, 0)) if name == "one point" else laplacian(network)
    plain, y = laplacian_of(name), torch.zeros(3, 2, dtype=torch.float64)
    p = {k: v for k, v in p.items() if k not in "sq" or (k, name) in EXTRA}
    layers = find_layers(model, p, x, bias=bias)
    covered = {q.path for layer in layers for q in (layer.weight, layer.bias) if q is not None}
    assert covered == set(p) - ({"b"} if name in ("from the left",) else set()), str(layers)
    evaluation = evaluator(model, lrkfac.gaussian(), layers, "exact")(p, x, y)
    expected = grad(lambda p: plain(p, x).square().sum() / 6)(p)
    torch.testing.assert_close(lrkfac.materialize(evaluation.grads), expected)
    assert all(layer.by_example for layer in layers)
    rows = {k: j.flatten(2).flatten(0, 1) for k, j in jacrev(plain)(p, x).items()}
    tangent = {k: v.cos() for k, v in p.items()}
    along = sum(rows[k] @ tangent[k].flatten() for k in p)
    product = {k: (rows[k].T @ along).reshape(v.shape) / 3 for k, v in p.items()}
    torch.testing.assert_close(evaluation.product(tangent), product)
    for layer in layers:
        a, g = evaluation.statistics.inputs[layer.name], evaluation.statistics.output_gradients[layer.name]
        assert len(a) == len(g) == layer.uses
    names = sorted(covered)
    matrix = torch.cat([rows[k] for k in names], 1)
    damped = matrix.T @ matrix / 3 + 0.1 * torch.eye(matrix.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(damped, torch.cat([expected[k].flatten() for k in names]))
    tx = precondition_by_fisher(layers, full(), damping=0.1)
    step, _ = tx.update(evaluation.grads, tx.init(p), p, evaluation=evaluation)
    torch.testing.assert_close(torch.cat([step[k].flatten() for k in names]), solved, rtol=1e-9, atol=1e-9)


def test_an_unmodified_module_copies_and_pickles():
    torch.manual_seed(0)
    network, params = from_module(
        nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    )
    x = X.float()
    for model in (laplacian(network), derivatives(network, [(0, 1)])):
        layers = find_layers(lambda p, x, model=model: torch.cat(tuple_of(model(p, x)), -1), params, x, strict=True)
        assert [layer.d_in for layer in layers] == [4, 6, 6]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(params, x), model(params, x))
    assert laplacian(network)(params, x[0]).shape == (1,)


def tuple_of(result):
    return [x.flatten(1) for x in (result if isinstance(result, tuple) else (result,))]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3


REFUSED = {
    "a function without a rule": (lambda _, x: torch.fft.fft(x).real, "torch.fft.fft"),
    "in place": (lambda _, x: x.sin_(), "sin_"),
    "in-place activation": (lambda _, x: F.silu(x, inplace=True), "inplace=True"),
    "a function of torch.func": (lambda _, x: vmap(torch.sin)(x), "network"),
    "a custom function": (lambda _, x: Cube.apply(x), "custom torch.autograd.Function"),
    "a weight that depends on points": (lambda _, x: F.linear(C[:, :3], x), "depends on the points"),
    "no dependence": (lambda _, x: C, "expected a tensor that depends on the points"),
    "numpy": (lambda _, x: x.numpy(), "numpy"),
    "derivatives of derivatives": (lambda p, x: laplacian(lambda _, y: y.sin())(p, x), "those of derivatives"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_networks(name):
    network, words = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=words):
        laplacian(network)((), X)


def test_the_points_have_such_coordinates():
    with pytest.raises(ValueError, match=r"second: expected coordinates below 3 for points of shape .*, got 3"):
        derivatives(lambda _, x: x, [(0, 3)])((), X)
