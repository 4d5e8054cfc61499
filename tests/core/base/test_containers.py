"""Containers that ``optree`` does not know: opened, they are trees; closed again, they are what they were."""

from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from types import MappingProxyType
from typing import Any

import optree
import pytest
import torch
from torch import nn
from torch.utils import _pytree

from lrkfac.core.base.containers import closed, main_entry, named_entries, opened, result_leaves, with_opened_inputs


@dataclass
class Batch:
    x: Any
    mask: Any = None
    length: int = 3
    double: Any = field(init=False, default=None)

    def __post_init__(self):
        self.double = 2 * self.x


Frozen = make_dataclass("Frozen", ["x"], frozen=True, slots=True)
Pair = namedtuple("Pair", "left right")


@dataclass
class Registered:
    x: Any
    note: str = "unchanged"


_pytree.register_pytree_node(Registered, lambda r: ([r.x], r.note), lambda xs, note: Registered(*xs, note))


class Output(OrderedDict):
    """As the outputs of transformers' models."""

    def __getattr__(self, name):
        return self[name]


_pytree.register_pytree_node(
    Output, lambda o: (list(o.values()), list(o)), lambda xs, names: Output(zip(names, xs, strict=True))
)


@dataclass
class DataOutput(OrderedDict):
    """A dictionary that is a dataclass, too, and registered nowhere."""

    x: Any = None

    def __post_init__(self):
        self["x"] = self.x


class Fields(Mapping):
    """A mapping whose constructor takes fields."""

    def __init__(self, x, y):
        self.fields = {"y": y, "x": x}

    def __getitem__(self, name):
        return self.fields[name]

    def __iter__(self):
        return iter(self.fields)

    def __len__(self):
        return len(self.fields)


Dictionary = type("Dictionary", (dict,), {})


class Object:
    def __init__(self, x):
        self.x = x


class Slotted:
    __slots__ = ("x",)
    __init__ = Object.__init__


X, Y = torch.arange(3.0), torch.ones(2, 2)

CONTAINERS = {
    "UserDict": lambda x, y: UserDict(b=x, a=y),
    "subclass of dict": lambda x, y: Dictionary(b=x, a=y),
    "sizes": lambda x, y: UserDict(x=x, y=y, sizes=torch.Size([2])),
    "mappingproxy": lambda x, y: MappingProxyType({"b": x, "a": y}),
    "mapping of fields": Fields,
    "keys of several types": lambda x, y: UserDict({1: x, "a": y}),
    "dataclass": lambda x, y: [Batch(x), Batch(y, mask=x, length=5)],
    "frozen dataclass with slots": lambda x, y: (Frozen(x), Frozen(y)),
    "registered dataclass": lambda x, y: (Registered(x, "first"), Registered(y, "second")),
    "registered dictionary": lambda x, y: Output(loss=x, logits=y),
    "dictionary and dataclass": lambda x, y: (DataOutput(x), DataOutput(y)),
    "nested": lambda x, y: {"a": UserDict(b=Frozen(Output(c=Pair(x, (y, 1, "s", None))))), "d": deque([Frozen([x])])},
}
ONLY_KNOWN = {
    "tensor": X, "nothing": None, "plain": {"a": [X, (Y, 1)], "b": Pair(X, None)}, "text": "s", "type": Batch,
    "function": torch.relu, "module": nn.Linear(2, 3), "object without tensors": Object("s"), "set": {1, 2},
}  # fmt: skip


def described(x):
    """A container and all within it as nested tuples that can be compared."""
    if isinstance(x, torch.Tensor):
        return x.tolist()
    entries = named_entries(x)
    if entries is not None:
        note = x.note if isinstance(x, Registered) else None
        return type(x), [(name, described(value)) for name, value in entries.items()], note
    return (type(x), [described(one) for one in x]) if isinstance(x, list | tuple | deque) else x


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_closed_inverts_opened_and_takes_other_leaves(make):
    """With no trace of the first; forms are equal and hash where types and names are the same."""
    container = make(X, Y)
    tree, form = opened(container, "x")
    leaves = optree.tree_leaves(tree)
    assert {id(X), id(Y)} <= {id(x) for x in leaves}
    assert all(isinstance(x, torch.Tensor | torch.Size | int | str) for x in leaves)
    assert described(closed(tree, form)) == described(container)
    changed = optree.tree_map(lambda x: x[:1] + 1 if isinstance(x, torch.Tensor) else x, tree)
    expected = make(X[:1] + 1, Y[:1] + 1)
    if make is not CONTAINERS["dataclass"]:  # which computes a field in its constructor
        assert described(closed(changed, form)) == described(expected)
    else:
        assert closed(changed, form)[0].double.tolist() == [1.0]  # as any other field
    other = opened(expected, "x")[1]
    assert form == other and hash(form) == hash(other) and form != opened(UserDict(other=X), "x")[1]


@pytest.mark.parametrize("x", ONLY_KNOWN.values(), ids=ONLY_KNOWN)
def test_all_else_passes(x):
    tree, form = opened(x, "x")
    assert tree is x and form is None and closed(tree, form) is x


HOLDING = [lambda x: {x}, lambda x: Object({"a": [x]}), lambda x: UserDict(a=[Object(x)]), lambda x: Frozen({x})]


@pytest.mark.parametrize("make", [Object, Slotted, *HOLDING])
def test_objects_that_hold_tensors_are_refused(make):
    with pytest.raises(TypeError, match=r"inputs: (Object|Slotted|set) holds tensors .* convert it .* or register its"):
        opened((X, make(X)), "inputs")
    assert opened(make("no tensor"), "inputs") is not None


class Stubborn(UserDict):
    def __init__(self, a, b):
        super().__init__(c=a, d=b)


class Forgetful(UserDict):
    def __init__(self, entries, full=False):
        super().__init__(entries if full else {})


@pytest.mark.parametrize("x", [Stubborn(X, Y), Forgetful({"a": X}, full=True)])
def test_a_mapping_that_cannot_be_made_again_is_refused(x):
    with pytest.raises(TypeError, match=f"inputs: expected a container .* got {type(x).__name__}, .*convert it"):
        with_opened_inputs(lambda params, inputs: inputs, (X, x))


def test_a_model_gets_the_containers():
    model, tree = with_opened_inputs(lambda params, inputs: (params, type(inputs), inputs["a"]), UserDict(a=X))
    assert tree == {"a": X} and type(tree) is dict
    assert model("p", {"a": "other"}) == ("p", UserDict, "other")
    same, inputs = with_opened_inputs(torch.add, {"a": X})
    assert same is torch.add and inputs["a"] is X


def test_named_entries():
    assert named_entries(Pair(1, 2)) == {"left": 1, "right": 2}
    assert named_entries(Frozen(1)) == {"x": 1}
    assert named_entries(UserDict(a=1)) == {"a": 1}
    assert [named_entries(x) for x in (X, (1, 2), [1], 1, "s", Frozen, None)] == [None] * 7


def test_registered_containers_are_opened_by_name_where_their_entries_are_the_fields():
    """Without those that are ``None``, which transformers leaves out; else in the order of their registration."""

    register, fields = _pytree.register_pytree_node, [(name, Any, None) for name in ("x", "y", "z")]
    optional = make_dataclass("Optional", fields)
    register(optional, lambda o: ([a for a in (o.x, o.y, o.z) if a is not None], None), lambda xs, _: tuple(xs))
    assert opened(optional(z=X, x=Y), "x")[0] == {"x": Y, "z": X}
    register(half := type("Half", (optional,), {}), lambda o: ([2 * o.x], None), lambda xs, _: tuple(xs))
    (tree,) = opened(half(X, Y), "x")[0]
    assert tree.tolist() == [0.0, 2.0, 4.0]


def test_main_entry():
    for make in (UserDict, dict, Output, namedtuple("Logits", "loss logits")):
        assert main_entry(make(loss=X, logits=Y)) is Y
        x = make(loss=X, logits=None)
        assert main_entry(x) is x
    assert all(main_entry(x) is x for x in (X, (X, Y), Pair(X, Y), "s"))


def test_result_leaves_start_with_the_outputs():
    """Unknown objects beside them, such as a cache, are left alone."""
    x = Output(loss=X.sum(), logits=Y, cache=Object(X))
    assert result_leaves(x)[0] is Y and result_leaves((x, "aux"))[0] is Y
    assert result_leaves((Y, Object(X)))[0] is Y and result_leaves([X, Y])[1] is Y
    assert isinstance(result_leaves(Object(X))[0], Object)
    assert any(leaf is X for leaf in result_leaves((Y, Frozen(X))))
