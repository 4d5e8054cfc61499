"""Containers that ``optree`` does not know as trees that it does, and back: mappings, dataclasses, and the types that
torch's pytree has registered, such as the outputs of transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.private_torch import registered_container
from lrkfac.core.base.types import Tree

ATOMS = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
"""Types of leaves that are no containers."""


REMEDY = (
    "convert it to a tensor, tuple, list, dictionary (or another mapping) or dataclass, or register its type with "
    "torch.utils._pytree.register_pytree_node or optree.register_pytree_node"
)


@dataclass(frozen=True)
class Container:
    """A container that ``optree`` does not know, without what it holds.

    Attributes:
        type: Its type.
        names: Names of its entries, if it has names.
        context: What torch's pytree needs to make it again.
        form: The containers within it.
    """

    type: type
    names: tuple[Any, ...] | None
    context: Any = field(hash=False)
    form: Form | None

    def holding(self, tree: Tree) -> Any:
        """Return the container with the entries of a tree.

        Raises:
            TypeError: If the type cannot be made of its entries.
        """
        tree = closed(tree, self.form)
        names = self.names
        try:
            return self._made({name: tree[name] for name in names} if names is not None else tuple(tree))
        except Exception as error:
            raise TypeError(
                f"expected a container that is made anew of its entries, got {self.type.__name__}, of "
                f"which {type(error).__name__}: {error}; {REMEDY}"
            ) from error

    def _made(self, entries: Any) -> Any:
        registered = registered_container(self.type)
        if registered is not None:
            return registered[1](list(entries.values() if isinstance(entries, dict) else entries), self.context)
        if issubclass(self.type, Mapping):
            return _mapping(self.type, entries)
        # As it was: not by its constructor, which may look at values or compute fields again.
        new = object.__new__(self.type)
        for name, value in entries.items():
            object.__setattr__(new, name, value)
        return new


@dataclass(frozen=True)
class Form:
    """The containers in a tree that ``optree`` does not know.

    Attributes:
        structure: Of the tree, in which these containers are leaves.
        containers: For each leaf the container, ``None`` for others.
    """

    structure: Any
    containers: tuple[Container | None, ...]


def opened(x: Any, what: str | None) -> tuple[Tree, Form | None]:
    """Return a tree with dictionaries and tuples in the place of containers that ``optree`` does not know.

    Args:
        x: A tree.
        what: Its name in errors; with ``None``, objects of other types pass.

    Returns:
        The tree, and the form with which ``closed`` returns ``x``; ``x`` and ``None`` where there is nothing to open.

    Raises:
        TypeError: If an object of another type holds tensors.
    """
    leaves, structure = optree.tree_flatten(x)
    if all([isinstance(leaf, ATOMS) for leaf in leaves]):
        return x, None
    parts = [_opened_leaf(leaf, what) for leaf in leaves]
    containers = tuple([container for _, container in parts])
    if all([container is None for container in containers]):
        return x, None
    return optree.tree_unflatten(structure, [part for part, _ in parts]), Form(structure, containers)


def closed(x: Tree, form: Form | None) -> Any:
    """Invert ``opened``, with other leaves if need be."""
    if form is None:
        return x
    parts = form.structure.flatten_up_to(x)
    pairs = zip(parts, form.containers, strict=True)
    return optree.tree_unflatten(form.structure, [part if c is None else c.holding(part) for part, c in pairs])


def named_entries(x: Any) -> dict[Any, Any] | None:
    """Return the entries of a mapping, a dataclass or a NamedTuple by name, ``None`` of anything else."""
    if isinstance(x, Mapping):
        return dict(x.items())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return dict(zip(x._fields, x, strict=True))
    if is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in fields(x) if hasattr(x, f.name)}
    return None


def main_entry(x: Any) -> Any:
    """Return the entry ``logits`` of a container that has one, and anything else as it is."""
    entries = None if isinstance(x, Tensor) else named_entries(x)
    return x if entries is None or entries.get("logits") is None else entries["logits"]


def result_leaves(result: Any) -> list[Any]:
    """Return the leaves of outputs, or of outputs and more: those of the entry ``logits`` first, where there is one."""
    outputs = result[0] if type(result) is tuple and result else result
    return [leaf for part in (main_entry(outputs), result) for leaf in optree.tree_leaves(opened(part, None)[0])]


def described(x: Any) -> str:
    """Return the name of the type of an object, with the names of its entries if it has some."""
    if isinstance(x, Tensor):
        return "a tensor"
    names = [name for name, value in (named_entries(x) or {}).items() if value is not None]
    return f"{type(x).__name__} with {names}" if names else type(x).__name__


@dataclass(frozen=True)
class Rebuilding:
    """A model as a function of opened inputs."""

    model: Callable[[Tree, Any], Any]
    form: Form

    def __call__(self, params: Tree, inputs: Tree) -> Any:
        """Return what the model returns for the inputs in their own containers."""
        return self.model(params, closed(inputs, self.form))


def with_opened_inputs(model: Callable[[Tree, Any], Any], inputs: Any) -> tuple[Callable[[Tree, Any], Any], Tree]:
    """Return a model and its inputs, such that all containers of the inputs are known to ``optree``.

    Raises:
        TypeError: If an input is an object that holds tensors out of sight, or that cannot be made anew.
    """
    tree, form = opened(inputs, "inputs")
    if form is None:
        return model, inputs
    if not torch.compiler.is_compiling():
        try:
            closed(tree, form)
        except TypeError as error:
            raise TypeError(f"inputs: {error}") from error
    return Rebuilding(model, form), tree


def _opened_leaf(leaf: Any, what: str | None) -> tuple[Tree, Container | None]:
    if isinstance(leaf, ATOMS):
        return leaf, None
    entries = named_entries(leaf)
    registered = registered_container(type(leaf))
    context = None
    if registered is not None:
        children, context = registered[0](leaf)
        entries = _names_of(entries, list(children))
    elif entries is None:
        if what is not None and not torch.compiler.is_compiling() and _holds_tensors(leaf):
            raise TypeError(f"{what}: {type(leaf).__name__} holds tensors where they cannot be seen; {REMEDY}")
        return leaf, None
    tree, form = opened(tuple(children) if entries is None else entries, what)
    return tree, Container(type(leaf), None if entries is None else tuple(entries), context, form)


def _names_of(entries: dict[Any, Any] | None, children: list[Any]) -> dict[Any, Any] | None:
    """Return the children by name, where they are the entries that are not ``None``, in the same order."""
    named = {name: x for name, x in (entries or {}).items() if x is not None}
    same = len(named) == len(children) and all([x is y for x, y in zip(named.values(), children, strict=True)])
    return named if same else None


def _mapping(kind: type, entries: dict[Any, Any]) -> Any:
    """Return a mapping of a type, by its constructor: from a dictionary, or from keyword arguments."""
    make: Callable[..., Any] = kind
    if is_dataclass(kind):
        return make(**entries)
    try:
        new = make(entries)
    except TypeError:
        new = make(**entries)
    if len(new) != len(entries):
        raise ValueError(f"its constructor makes {len(new)} entries of {len(entries)}")
    return new


def _holds_tensors(x: Any, depth: int = 4) -> bool:
    """Return whether an object has a tensor among its attributes or elements, or theirs; functions have none."""
    if isinstance(x, Tensor) or depth == 0:
        return isinstance(x, Tensor)
    if isinstance(x, ATOMS) or callable(x):
        return False
    parts = list(getattr(x, "__dict__", {}).values())
    for slots in (getattr(kind, "__slots__", ()) for kind in type(x).__mro__):
        parts += [getattr(x, name, None) for name in ([slots] if isinstance(slots, str) else slots)]
    if isinstance(x, Mapping):
        parts += list(x.values())
    elif isinstance(x, Sequence | Set):
        parts += list(x)
    return any(_holds_tensors(part, depth - 1) for part in parts)
