"""A value that trees of tensors carry along: part of a tree's structure, and no leaf of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import optree

from lrkfac.core.base.private_torch import register_without_leaves

T = TypeVar("T")


@dataclass(frozen=True)
class Static(Generic[T]):
    """A value in a tree that ``optree``, ``vmap`` and the compiler leave alone."""

    value: T

    def __hash__(self) -> int:
        return hash(type(self.value))  # the value itself may have no hash


def _value(static: Static[Any]) -> tuple[tuple[()], Static[Any]]:
    return (), static


def _same(static: Static[Any], _: Any) -> Static[Any]:
    return static


optree.register_pytree_node(Static, _value, _same, namespace=optree.registry.__GLOBAL_NAMESPACE)
register_without_leaves(Static)
