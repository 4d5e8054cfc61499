"""Derivatives of functions of trees.

By ``torch.func`` on lists, where torch walks each tree ten times. The compiler walks trees once, but cannot flatten a
dictionary that was made within the function it compiles: there torch receives the tree.

By ``torch.autograd`` where the function does what ``torch.func`` refuses: it calls ``torch.autograd.grad`` itself, or a
``torch.autograd.Function`` without ``setup_context``, or it has hooks on saved tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp

from lrkfac.core.base.by_autograd import attached, autograd_enabled, constant
from lrkfac.core.base.leaves import tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.types import Tree

Function = Callable[[Tree], tuple[list[Tensor], Tree]]
"""``function(tree) -> (outputs, aux)``; ``aux`` holds tensors alone."""


def transposed(
    function: Function, tree: Tree, autograd: bool = False
) -> tuple[list[Tensor], Callable[[list[Tensor]], Tree], Tree]:
    """Evaluate a function and the transpose of its derivative.

    Args:
        function: See ``Function``.
        tree: Where to differentiate.
        autograd: Whether by ``torch.autograd``.

    Returns:
        The outputs; a function from a cotangent like them to a gradient like ``tree``; and ``aux``.
    """
    if torch.compiler.is_compiling() and not autograd:
        outputs, back, aux = vjp(function, tree, has_aux=True)
        return outputs, lambda cotangent: back(cotangent)[0], aux
    leaves, structure = tree_flatten(tree)
    if autograd:
        outputs, of_leaves, aux = _transposed_by_autograd(function, leaves, structure)
        return outputs, lambda cotangent: tree_unflatten(structure, of_leaves(cotangent)), aux
    aux_structure: list[Any] = []

    def from_leaves(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, aux = function(tree_unflatten(structure, leaves))
        aux_leaves, aux_structure[:] = _flattened(aux)
        return outputs, aux_leaves

    outputs, back, aux = vjp(from_leaves, leaves, has_aux=True)

    def transpose(cotangent: list[Tensor]) -> Tree:
        return tree_unflatten(structure, back(cotangent)[0])

    return outputs, transpose, tree_unflatten(aux_structure[0], aux)


def change(
    function: Callable[[Tree], list[Tensor]], tree: Tree, tangent: Tree, autograd: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of a function and their derivative along a tangent.

    It is a forward derivative; where torch has none, the transpose of the transpose, for which the gradient must be
    differentiable.

    Raises:
        NotImplementedError: If an operation has neither. Errors of the function pass.
    """
    try:
        return _change_by_autograd(function, tree, tangent) if autograd else jvp(function, (tree,), (tangent,))
    except (NotImplementedError, RuntimeError) as error:  # the second where the function takes forward derivatives
        if torch.compiler.is_compiling():
            raise
        try:
            return _change_by_transposes(function, tree, tangent, autograd)
        except (NotImplementedError, RuntimeError):
            raise error from None


def _transposed_by_autograd(
    function: Function, leaves: list[Tensor], structure: Any
) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]], Tree]:
    with autograd_enabled():
        leaves = attached(leaves)
        outputs, aux = function(tree_unflatten(structure, leaves))

    def transpose(cotangent: list[Tensor]) -> list[Tensor]:
        return _gradients(outputs, leaves, cotangent)

    return constant(outputs), transpose, constant(aux)


def _gradients(
    outputs: list[Tensor], leaves: list[Tensor], cotangent: list[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """Return the gradients of all leaves, zeros where nothing depends on them; the graph stays."""
    of_outputs = [(f, g) for f, g in zip(outputs, cotangent, strict=True) if f.requires_grad]
    if not of_outputs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(
        [f for f, _ in of_outputs],
        leaves,
        [g for _, g in of_outputs],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )
    return list(gradients)


def _change_by_autograd(
    function: Callable[[Tree], list[Tensor]], tree: Tree, tangent: Tree
) -> tuple[list[Tensor], list[Tensor]]:
    with autograd_enabled(), forward_ad.dual_level():
        duals = optree.tree_map(forward_ad.make_dual, attached(tree), constant(tangent))
        parts = [forward_ad.unpack_dual(f) for f in function(duals)]
        return constant([f for f, _ in parts]), constant([torch.zeros_like(f) if d is None else d for f, d in parts])


def _change_by_transposes(
    function: Callable[[Tree], list[Tensor]], tree: Tree, tangent: Tree, autograd: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and change; the transpose is linear in the cotangent, so that it may stand at zero."""
    if not autograd:
        outputs, transpose, _ = transposed(lambda tree: (function(tree), []), tree)
        _, back, _ = transposed(lambda g: ([*tree_leaves(transpose(g))], []), [torch.zeros_like(f) for f in outputs])
        return outputs, back(tree_leaves(tangent))
    with autograd_enabled():
        leaves, structure = tree_flatten(attached(tree))
        outputs = function(tree_unflatten(structure, leaves))
        cotangent = attached([torch.zeros_like(f) for f in outputs])
        gradients = _gradients(outputs, leaves, cotangent, create_graph=True)
        changes = _gradients(gradients, cotangent, constant(tree_leaves(tangent)))
    return constant(outputs), constant(changes)


def _flattened(aux: Tree) -> tuple[list[Tensor], list[Any]]:
    leaves, structure = tree_flatten(aux)
    return leaves, [structure]
