"""Derivatives of functions of trees equal those that ``torch.func`` takes of the trees themselves."""

import optree
import torch
from torch.func import vjp, vmap

from lrkfac.core.evaluation.derivatives import transposed

TREE = {"b": (torch.tensor([1.0, 2.0]).double(), [torch.tensor(3.0).double()]), "a": torch.ones(2, 2).double()}


def outputs(tree):
    x, (y,) = tree["b"]
    total = (tree["a"] @ x).sum() * y.sin()
    return [total, tree["a"] * total], {"product": [x * y], "nothing": ()}


def test_transpose_and_under_vmap():
    cotangents = [torch.tensor([0.5, 2.0]).double(), torch.randn(2, 2, 2).double()]
    values, back, aux = transposed(outputs, TREE)
    expected, reference, _ = vjp(outputs, TREE, has_aux=True)
    assert all(map(torch.equal, values, expected))
    assert aux["nothing"] == () and torch.equal(aux["product"][0], TREE["b"][0] * 3)
    gradients = vmap(back)(cotangents)
    for i in range(2):
        alone = reference([c[i] for c in cotangents])[0]
        optree.tree_map(lambda many, one, i=i: torch.testing.assert_close(many[i], one), gradients, alone)
