"""Products with the Fisher matrix by what the forward pass knows of thin layers are those without, and cost less."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

import lrkfac
from lrkfac.core.evaluation.tangents import ThinPass
from tests.dispatch import Launches
from tests.transforms.test_base import close

WIDE, BATCH, CLASSES = 40, 4, 3


def perceptron():
    return nn.Sequential(
        nn.Linear(WIDE, WIDE), nn.ELU(inplace=True), nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE, bias=False),
        nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Sigmoid(), nn.Linear(WIDE, CLASSES),
    )  # fmt: skip


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, WIDE // 4)), nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(2 * WIDE, WIDE),
        nn.ReLU(inplace=True), nn.Linear(WIDE, CLASSES),
    )  # fmt: skip


def of_module(make):
    torch.manual_seed(0)
    return lrkfac.from_module(make().double())


def by_hand(function):
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (WIDE, WIDE), "v": (WIDE, WIDE), "b": (WIDE,), "w": (CLASSES, WIDE)}
    params = {name: torch.randn(*shape, generator=generator).double() / 6 for name, shape in shapes.items()}
    return function, params


def products(params, x):
    """A weight that stands on the right, one on the left of columns, a bias that is added later."""
    hidden = torch.tanh(x @ params["u"] + params["b"])
    return (params["v"] @ hidden.mT).mT.sin() @ params["w"].T


def inner(params, x):
    """A weight within a derivative that the model takes."""
    energy = lambda one: (one @ params["u"]).sin().square().sum()  # noqa: E731
    return (torch.tanh(x @ params["v"] + params["b"]) + vmap(grad(energy))(x)) @ params["w"].T


def tied_bias(params, x):
    """A bias of two layers, which is none of theirs."""
    hidden = F.linear(torch.tanh(F.linear(x, params["u"], params["b"])), params["v"], params["b"])
    return torch.tanh(hidden) @ params["w"].T


def bias_elsewhere(params, x):
    """A bias that has another use."""
    return torch.tanh(F.linear(x, params["u"], params["b"])) * params["b"].exp() @ params["w"].T


def computed_bias(params, x):
    """A bias that is made of parameters."""
    return torch.tanh(F.linear(x, params["u"], params["b"] * params["v"].sum(0))) @ params["w"].T


def added_by_the_network(params, x):
    """A term of addmm that depends on the input."""
    return torch.addmm(torch.tanh(x @ params["v"]), x.sin(), params["u"].T).tanh() @ params["w"].T


MODELS = {
    "tied bias": (by_hand, tied_bias),
    "bias elsewhere": (by_hand, bias_elsewhere),
    "computed bias": (by_hand, computed_bias),
    "added by the network": (by_hand, added_by_the_network),
    "perceptron": (of_module, perceptron),
    "convolutional": (of_module, convolutional),
    "products": (by_hand, products),
    "inner": (by_hand, inner),
}


def evaluations(name, statistics=False, bias="joint"):
    """Model, parameters and batch; evaluations without and with thin gradients."""
    make, what = MODELS[name]
    model, params = make(what)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, WIDE, generator=generator).double()
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    layers = lrkfac.find_layers(model, params, x, bias=bias)
    each = [lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=thin) for thin in (False, True)]
    return params, [evaluate(params, x, y, statistics=statistics) for evaluate in each], (each[1], x, y)


def tangents(params, number=3):
    generator = torch.Generator().manual_seed(2)
    draw = lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype)  # noqa: E731
    return [optree.tree_map(draw, params) for _ in range(number)]


def known(evaluation):
    thin = evaluation.gram.args[0].thin
    return () if thin is None else tuple(thin.recorded)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(("name", "layers", "bias"), [
    ("perceptron", ("0", "3", "5"), "joint"), ("convolutional", ("4",), "joint"), ("products", ("u",), "joint"),
    ("inner", (), "joint"), ("perceptron", ("0", "3"), "separate"), ("tied bias", ("u", "v"), "joint"),
    ("bias elsewhere", ("u",), "joint"), ("computed bias", ("u",), "joint"), ("added by the network", ("u",), "joint"),
])  # fmt: skip
def test_thin_layers_change_no_product(name, layers, bias, statistics):
    params, (plain, thin), _ = evaluations(name, statistics, bias)
    assert known(plain) == () and set(layers) <= {layer.split(".weight")[0] for layer in known(thin)}
    some = tangents(params)
    expected = plain.gram(*some)
    stacked = optree.tree_map(lambda *x: torch.stack(x), *some)
    for found in (thin.gram(*some), thin.gram(stacked), plain.gram(stacked), thin.gram(*some)):
        close(found, expected, rtol=1e-10)
    close(thin.quadratic(some[0], some[1]), expected[0, 1], rtol=1e-10)
    close(thin.quadratic(some[0], some[0]), expected[0, 0], rtol=1e-10)


def test_after_a_change_in_place_products_are_those_of_the_new_parameters():
    params, (plain, thin), _ = evaluations("products")
    some = tangents(params)
    before = thin.gram(*some)
    for p in params.values():
        p.mul_(1.5)
    close(thin.gram(*some), plain.gram(*some), rtol=1e-10)
    assert not torch.allclose(before, thin.gram(*some))


def test_tangents_that_do_not_fit_are_refused():
    params, (_, thin), _ = evaluations("perceptron")
    u, v = tangents(params, 2)
    with pytest.raises(ValueError, match="gram: tangents"):
        thin.gram(u, {**v, "0.weight": v["0.weight"][:1]})


def test_thin_layers_are_not_run_again():
    """Two products for each tangent and layer, but one of all tangents with each weight, none for the first layer."""
    params, (_, thin), _ = evaluations("perceptron")
    with Launches() as counted:
        thin.gram(*tangents(params, 2))
    kernels = counted.kernels
    of_weights = 2 * 3  # input times the change of the weight
    of_inputs = 2  # the change of the input times the weight
    of_head = 3  # the head is not thin: both, and the output
    assert sum(kernels[name] for name in ("mm", "addmm", "bmm", "baddbmm")) <= of_weights + of_inputs + of_head + 1


def test_an_ensemble_has_the_products_of_its_members():
    params, _, (evaluate, x, y) = evaluations("perceptron")
    members = tangents(params, 2)
    u, v = tangents(params, 2)
    of_one = lambda p: evaluate(p, x, y, statistics=False).gram(u, v)  # noqa: E731
    found = vmap(of_one)(optree.tree_map(lambda *x: torch.stack(x), *members))
    close(found, torch.stack([of_one(member) for member in members]), rtol=1e-9)


def test_a_batch_in_pieces_has_the_products_of_the_whole():
    params, (_, thin), (evaluate, x, y) = evaluations("perceptron")
    some = tangents(params, 2)
    pieces = [evaluate(params, x[part], y[part]) for part in (slice(0, 1), slice(1, None))]
    close(lrkfac.merge_evaluations(pieces).gram(*some), thin.gram(*some), rtol=1e-10)


def tries(monkeypatch):
    """The calls of the way by thin layers, as they come."""
    calls, along = [], ThinPass.along
    monkeypatch.setattr(ThinPass, "along", lambda *args: calls.append(1) or along(*args))
    return calls


def normalized():
    """A layer without a forward derivative beside thin ones."""
    torch.manual_seed(0)
    last = nn.utils.parametrizations.weight_norm(nn.Linear(WIDE, CLASSES))
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), last)


@pytest.mark.parametrize(("make", "autocast"), [(normalized, False), (perceptron, True)])
def test_a_way_that_fails_is_tried_once_for_each_form_of_the_inputs(make, autocast, monkeypatch):
    """With autocast, evaluations are under it and products are not."""
    model, params = lrkfac.from_module(make())
    x, y = torch.randn(BATCH, WIDE), torch.randint(CLASSES, (BATCH,))
    layers = lrkfac.find_layers(model, params, x)
    plain, thin = (lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=one) for one in (False, True))
    some, calls = tangents(params, 2), tries(monkeypatch)

    def products(evaluate, size=BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            evaluation = evaluate(params, x[:size], y[:size], statistics=False)
        return evaluation.gram(*some)

    expected = products(plain)
    for _ in range(3):
        close(products(thin), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    products(thin, BATCH - 1)
    assert len(calls) == 2
    products(copy.deepcopy(thin))
    assert len(calls) == 3


def test_a_way_that_works_is_taken_again(monkeypatch):
    params, (_, thin), _ = evaluations("perceptron")
    calls = tries(monkeypatch)
    for _ in range(3):
        thin.gram(*tangents(params, 2))
    assert len(calls) == 3
