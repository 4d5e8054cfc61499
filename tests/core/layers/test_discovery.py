"""``find_layers``: what it describes, and what it refuses."""

from math import prod
from typing import NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F

from lrkfac import find_layers
from tests import cases
from tests.tensors import normal

X, W, V, B = normal(5, 4, seed=3), normal(4, 4), normal(4, 4, seed=1) + 1, normal(4, seed=2)


def square(**more):
    """A square weight and a bias that fits it, so that any of them may be shared."""
    return {"weight": W, "bias": B, **more}


def linear(p, x):
    return F.linear(x, p["weight"], p["bias"])


class Affine(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_every_layer_of_a_network_is_described(case):
    layers = find_layers(case.model, case.params, case.inputs)
    assert [layer.name for layer in layers] == list(case.layers)
    for layer, (name, spec) in zip(layers, case.layers.items(), strict=True):
        assert layers[name] is layer
        assert (layer.kind, layer.groups, layer.uses) == (spec.kind, spec.groups, 1)
        assert layer.kinds == (spec.kind,) and layer.sites == ((f"{name}.weight", 0),)
        assert (layer.weight.path, layer.weight.shape) == (f"{name}.weight", spec.weight_shape)
        assert (layer.bias and layer.bias.path) == (f"{name}.bias" if spec.bias else None)
        assert layer.d_in == prod(spec.weight_shape[1:]) + spec.bias
        assert layer.d_out == spec.weight_shape[0] // spec.groups
        for parameter in filter(None, (layer.weight, layer.bias)):
            leaf = optree.tree_leaves(case.params)[parameter.index]
            assert leaf is case.params[parameter.path] and tuple(leaf.shape) == parameter.shape
    assert [p.path for p, _ in layers.uncovered] == [name for name in case.params if name.endswith("shift")]
    single = {name: p.float() for name, p in case.params.items()}
    assert find_layers(case.model, single, case.inputs[:1].float()) == layers, "of any batch size and dtype"


def test_a_weight_that_is_also_used_transposed_is_not_covered():
    weight = torch.randn(3, 3)
    layers = find_layers(lambda p, x: F.linear(x, p["w"]).tanh() @ p["w"] @ p["v"], {"w": weight, "v": weight}, weight)
    assert [layer.name for layer in layers] == ["v"]
    assert "arranged differently" in dict((p.path, reason) for p, reason in layers.uncovered)["w"]


def test_names_in_the_order_of_first_use():
    params = {"net": {"z": Affine(W, B), "a": [V]}}
    layers = find_layers(lambda p, x: F.linear(F.linear(x, *p["net"]["z"]), p["net"]["a"][0]), params, X)
    assert [layer.name for layer in layers] == ["net.z", "net.a"] and layers.covered == {0, 1, 2}
    assert optree.tree_leaves(layers.tree) == list(layers.parameters) and not layers.uncovered
    for layer, weight in zip(layers, (W, V), strict=True):
        assert optree.tree_leaves(params)[layer.weight.index] is weight


NOT_COVERED = {
    "never used": (linear, {"v": V}, {"v": "not used by the model"}),
    "weight used elsewhere": (
        lambda p, x: F.linear(linear(p, x), p["v"]) + p["v"].square().sum(), {"v": V},
        {"v": "used by torch.Tensor.square"},
    ),
    "weight and bias used elsewhere": (
        lambda p, x: linear(p, F.linear(x, p["v"], p["c"]).mul(p["v"][0])), {"v": V, "c": B},
        {"v": "used in parts that overlap", "c": "bias of an operation whose weight is not covered"},
    ),
    "input of a layer": (
        lambda p, x: linear(p, x) + linear(p, p["v"]), {"v": V[:1]}, {"v": "functional.linear"},
    ),
    "a multiple by addmm": (
        lambda p, x: torch.addmm(x, linear(p, x), p["v"], alpha=2.0), {"v": V}, {"v": "used by torch.addmm"},
    ),
    "a multiple by add": (
        lambda p, x: torch.add(linear(p, x), p["v"][0], alpha=2.0), {"v": V[:1]}, {"v": "used by torch.add"},
    ),
    "a clone": (
        lambda p, x: linear(p, F.linear(x, p["v"].clone())), {"v": V}, {"v": "used by torch.Tensor.clone"},
    ),
    "another operation": (
        lambda p, x: linear(p, x) * F.bilinear(x, x, p["v"][None]), {"v": V}, {"v": "functional.bilinear"},
    ),
    "a batch of weights": (
        lambda p, x: linear(p, torch.einsum("nhi,hio->nho", x[:, None], p["v"][None])[:, 0]), {"v": V},
        {"v": "einsum (covered for one weight and one input"},
    ),
    "three factors": (
        lambda p, x: linear(p, torch.einsum("ni,nj,oij->no", x, x, p["v"])), {"v": normal(4, 4, 4)},
        {"v": "einsum (covered for one weight and one input"},
    ),
    "a vector in a product": (
        lambda p, x: linear(p, x) + (x[:, [0, 2]] @ p["v"])[:, None], {"v": normal(2)},
        {"v": "matmul (covered for a weight with two axes"},
    ),
    "as it is and turned": (
        lambda p, x: linear(p, (x @ p["v"]).tanh() @ p["v"].mT), {"v": V}, {"v": "arranged differently"},
    ),
    "rows of a weight and a scale": (
        lambda p, x: linear(p, F.linear(x, p["v"]) * p["v"]), {"v": V[:1]}, {"v": "different ways: linear and scale"},
    ),
    "entries picked by a constant": (
        lambda p, x: F.linear(linear(p, x), p["v"][torch.tensor([2, 0, 1])]), {"v": V},
        {"v": "used by torch.Tensor.__getitem__"},
    ),
    "different groups": (
        lambda p, x: linear(p, sum(F.conv2d(x[:, :g, None, None], p["k"], groups=g) for g in (2, 4))[..., 0, 0]),
        {"k": normal(4, 1, 1, 1)}, {"k": "used by conv2d with different numbers of groups"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "more", "reasons"), NOT_COVERED.values(), ids=NOT_COVERED.keys())
def test_what_is_not_covered_is_listed_with_the_reason(model, more, reasons):
    params = square(**more)
    layers = find_layers(model, params, X)
    assert {p.path for p, _ in layers.uncovered} == set(reasons)
    assert {p.path for p in layers.parameters if p.index in layers.covered} == set(params) - set(reasons)
    for parameter, reason in layers.uncovered:
        assert reasons[parameter.path] in reason
        assert f"{parameter.path} {parameter.shape}: {reason}" in str(layers)
    with pytest.raises(ValueError, match="strict=True") as error:
        find_layers(model, params, X, strict=True)
    assert all(f"{p.path!r}: {reason}" in str(error.value) for p, reason in layers.uncovered)


def test_inputs_and_outputs_may_be_trees():
    for wrap in (lambda y: {"y": y}, lambda y: (y, "aux"), lambda y: ((y,), {})):
        assert find_layers(lambda p, x, wrap=wrap: wrap(linear(p, x)), square(), X) == find_layers(linear, square(), X)
    inputs = {"x": X, "masks": [torch.ones(5, 4, dtype=torch.bool)]}
    layers = find_layers(lambda p, i: linear(p, torch.where(i["masks"][0], i["x"], 0)), square(), inputs)
    assert not layers.uncovered
    for wrap, kind in ((lambda y: [], "list"), (lambda y: None, "NoneType"), (lambda y: ("y", y), "str")):
        with pytest.raises(TypeError, match=rf"model: expected outputs as a tensor.*got {kind}"):
            find_layers(lambda p, x, wrap=wrap: wrap(linear(p, x)), square(), X)


@pytest.mark.parametrize("n", [1, 4, 12])
def test_outputs_that_are_equal_for_all_examples_have_one_entry_for_each(n):
    """Behind a rectifier that is zero for the few examples that are run; of more, one may be seen to move."""
    dead = lambda p, x: F.linear(F.relu(F.linear(x, p["weight"], p["bias"])), p["last"])  # noqa: E731
    params = square(bias=B - 100, last=V)
    layers = find_layers(dead, params, normal(n, 4))
    assert layers.single and layers.independent is None and all(layer.by_example for layer in layers)
    of_all = find_layers(lambda p, x: dead(p, x).mean(0), params, normal(n, 4))
    in_rows = find_layers(lambda p, x: dead(p, x).flatten(0, 1), params, normal(n, 3, 4))
    assert not of_all.single and not in_rows.single
