"""Derivatives of functions of trees equal those that ``torch.func`` takes of the trees themselves."""

import optree
import torch
from torch.func import grad_and_value, vjp, vmap

from lrkfac.core.evaluation.derivatives import gradient, transposed

TREE = {"b": (torch.tensor([1.0, 2.0]).double(), [torch.tensor(3.0).double()]), "a": torch.ones(2, 2).double()}


def value(tree):
    x, (y,) = tree["b"]
    return (tree["a"] @ x).sum() * y.sin(), {"seen": [x * y], "nothing": ()}


def outputs(tree):
    total, aux = value(tree)
    return [total, tree["a"] * total], aux


def test_gradient():
    found, at, aux = gradient(value, TREE)
    expected, (there, _) = grad_and_value(value, has_aux=True)(TREE)
    assert optree.tree_all(optree.tree_map(torch.equal, found, expected)) and torch.equal(at, there)
    assert aux["nothing"] == () and torch.equal(aux["seen"][0], TREE["b"][0] * 3)


def test_transpose_and_under_vmap():
    cotangents = [torch.tensor([0.5, 2.0]).double(), torch.randn(2, 2, 2).double()]
    there, back, _ = transposed(outputs, TREE)
    expected, reference, _ = vjp(outputs, TREE, has_aux=True)
    assert all(map(torch.equal, there, expected))
    found = vmap(back)(cotangents)
    for i in range(2):
        one = reference([c[i] for c in cotangents])[0]
        optree.tree_map(lambda many, alone, i=i: torch.testing.assert_close(many[i], alone), found, one)
