"""Leaves and structures of trees are those of ``optree``, also where the compiler follows."""

from collections import OrderedDict, defaultdict, namedtuple

import optree
import pytest
import torch

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.leaves import same_structure, tree_flatten, tree_leaves, tree_structure, tree_unflatten
from tests.compiling import traced

Pair = namedtuple("Pair", "first second")
ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)
TREES = {
    "a tensor": ONE,
    "nothing": None,
    "a dictionary": {"b": ONE, "a": TWO, "c": {"z": THREE, "y": ONE}},
    "sequences": [ONE, (TWO, [THREE]), (), []],
    "a named tuple": Pair(Pair(ONE, None), {"b": TWO, "a": THREE}),
    "keys of two types": {2: ONE, 10: TWO, "a": THREE},
    "an ordered dictionary": {"a": OrderedDict(b=ONE, a=[TWO]), "b": THREE},
    "a dictionary with a default": defaultdict(list, b=ONE, a=(TWO, THREE)),
    "what torch returns": [torch.return_types.max((ONE, TWO)), THREE],
    "other leaves": {"b": torch.Size([2]), "a": LazyMatrix(ONE[None], TWO[None], ONE.dtype), "c": (1.0, "x", object())},
}
COMPILED = "a dictionary", "sequences", "a named tuple", "an ordered dictionary"


@pytest.fixture(params=[False, True], ids=["eager", "as compiled"])
def compiling(request, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


@pytest.mark.parametrize("name", TREES)
def test_leaves_and_structures_are_those_of_optree(compiling, name):
    tree = TREES[name]
    leaves, structure = tree_flatten(tree)
    assert [id(x) for x in leaves] == [id(x) for x in tree_leaves(tree)] == [id(x) for x in optree.tree_leaves(tree)]
    for new in (tree_unflatten(structure, range(len(leaves))), tree_unflatten(tree_structure(tree), leaves)):
        assert optree.tree_structure(new) == optree.tree_structure(tree)
    assert optree.tree_leaves(tree_unflatten(structure, range(len(leaves)))) == list(range(len(leaves)))
    if isinstance(tree, dict):
        assert list(tree_unflatten(structure, leaves)) == list(tree)


def test_structures_are_equal_where_trees_are_alike(compiling):
    usual = {name: tree_structure(TREES[name]) for name in list(TREES)[:5]}
    for name, structure in usual.items():
        assert [other for other, one in usual.items() if same_structure(structure, one)] == [name]
    tree = {"b": ONE, "a": [TWO, None]}
    for other in ({"b": ONE}, {"b": ONE, "c": [TWO, None]}, {"b": ONE, "a": [TWO]}, {"b": ONE, "a": (TWO, None)}):
        assert not same_structure(tree_structure(tree), tree_structure(other))
    assert same_structure(tree_structure(tree), tree_structure({"a": [object(), None], "b": 1}))


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiler_follows(name):
    def doubled(tree):
        leaves, structure = tree_flatten(tree)
        return tree_unflatten(structure, [2 * x for x in leaves]), same_structure(structure, tree_structure(tree))

    torch.compiler.reset()
    new, same = traced(doubled)(TREES[name])
    assert same or "ordered" in name
    assert optree.tree_structure(new) == optree.tree_structure(TREES[name])
    assert all(torch.equal(*pair) for pair in zip(tree_leaves(new), tree_leaves(doubled(TREES[name])[0]), strict=True))
