"""Reverse derivatives of functions of trees, by ``torch.func`` on lists: torch walks each tree ten times.

The compiler walks trees once, but cannot flatten a dictionary that was made within the function it compiles: there
torch receives the tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vjp

from lrkfac.core.base.types import Tree


def transposed(
    function: Callable[[Tree], tuple[list[Tensor], Tree]], tree: Tree
) -> tuple[list[Tensor], Callable[[list[Tensor]], Tree], Tree]:
    """Evaluate a function and the transpose of its derivative.

    Args:
        function: ``function(tree) -> (outputs, aux)``; ``aux`` holds tensors alone.
        tree: Where to differentiate.

    Returns:
        The outputs; a function from a cotangent like them to a gradient like ``tree``; and ``aux``.
    """
    if torch.compiler.is_compiling():
        outputs, back, aux = vjp(function, tree, has_aux=True)
        return outputs, lambda cotangent: back(cotangent)[0], aux
    leaves, structure = optree.tree_flatten(tree)
    aux_structure: list[Any] = []

    def of_leaves(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, aux = function(optree.tree_unflatten(structure, leaves))
        aux_leaves, aux_structure[:] = _flattened(aux)
        return outputs, aux_leaves

    outputs, back, aux = vjp(of_leaves, leaves, has_aux=True)

    def transpose(cotangent: list[Tensor]) -> Tree:
        return optree.tree_unflatten(structure, back(cotangent)[0])

    return outputs, transpose, optree.tree_unflatten(aux_structure[0], aux)


def _flattened(aux: Tree) -> tuple[list[Tensor], list[Any]]:
    leaves, structure = optree.tree_flatten(aux)
    return leaves, [structure]
