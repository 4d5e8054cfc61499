"""Derivatives of functions of trees, by ``torch.func`` on lists: torch walks each tree it is given ten times.

The compiler, which walks trees once, cannot flatten a dictionary that was made within what it compiles: there the tree
is handed to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from lrkfac.core.base.types import Tree


def gradient(function: Callable[[Tree], tuple[Tensor, Tree]], tree: Tree) -> tuple[Tree, Tensor, Tree]:
    """Gradient, value and aux of ``function(tree) -> (value, aux)``; aux holds tensors alone."""
    if torch.compiler.is_compiling():
        found, (value, aux) = grad_and_value(function, has_aux=True)(tree)
        return found, value, aux
    leaves, structure = optree.tree_flatten(tree)
    held: list[Any] = []

    def of_leaves(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        value, aux = function(optree.tree_unflatten(structure, leaves))
        return value, _flat(aux, held)

    found, (value, aux) = grad_and_value(of_leaves, has_aux=True)(leaves)
    return optree.tree_unflatten(structure, found), value, optree.tree_unflatten(held[0], aux)


def transposed(
    function: Callable[[Tree], tuple[list[Tensor], Tree]], tree: Tree
) -> tuple[list[Tensor], Callable[[list[Tensor]], Tree], Tree]:
    """Outputs, the way back from a cotangent like them, and aux of ``function(tree) -> (outputs, aux)``."""
    if torch.compiler.is_compiling():
        outputs, back, aux = vjp(function, tree, has_aux=True)
        return outputs, lambda cotangent: back(cotangent)[0], aux
    leaves, structure = optree.tree_flatten(tree)
    held: list[Any] = []

    def of_leaves(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, aux = function(optree.tree_unflatten(structure, leaves))
        return outputs, _flat(aux, held)

    outputs, back, aux = vjp(of_leaves, leaves, has_aux=True)

    def transpose(cotangent: list[Tensor]) -> Tree:
        return optree.tree_unflatten(structure, back(cotangent)[0])

    return outputs, transpose, optree.tree_unflatten(held[0], aux)


def _flat(aux: Tree, held: list[Any]) -> list[Tensor]:
    leaves, structure = optree.tree_flatten(aux)
    held[:] = [structure]
    return leaves
