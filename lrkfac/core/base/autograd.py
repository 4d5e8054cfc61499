"""Autograd's graph, followed only where derivatives through an update are asked for.

Parameters of a module require gradients. A step that recorded what it does with them would hang on the last one, and
that on all before it. Transformations of ``torch.func`` ask by themselves: inside of them nothing is cut.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.private_torch import is_differentiated, is_mapped, within_vmap
from lrkfac.core.base.types import Tree


def recording(asked: bool) -> AbstractContextManager[Any]:
    """Return a context in which autograd records nothing, unless it is asked to, or ``torch.func`` differentiates.

    Raises:
        RuntimeError: Under ``torch.inference_mode`` with a torch whose derivatives are then zero.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and forgets_derivatives():
        raise RuntimeError(
            "torch.inference_mode: derivatives by torch.func are zero within it in this version of torch; use "
            "torch.no_grad, or a newer torch"
        )
    return nullcontext() if asked or is_differentiated() else torch.no_grad()


@functools.cache
def forgets_derivatives() -> bool:
    """Return whether derivatives by ``torch.func`` under ``torch.inference_mode`` are zero: in torch 2.11 they are."""
    with torch.inference_mode():
        slope: Tensor = torch.func.grad(torch.square)(torch.ones(()))
        return not bool(slope)


def constant_unless(followed: Tree, x: Tree) -> Tree:
    """Return ``x`` cut off autograd's graph, unless ``followed`` hangs on one, or ``torch.func`` differentiates."""
    if is_differentiated() or not any(has_graph(leaf) for leaf in tree_leaves(x)):
        return x  # as in every step on detached parameters
    if any(has_graph(leaf) for leaf in tree_leaves(followed)):
        return x
    return optree.tree_map(lambda leaf: leaf.detach() if has_graph(leaf) else leaf, x)


def has_graph(x: Any) -> bool:
    """Return whether autograd follows a tensor or lazy matrix, also seen from inside ``vmap``."""
    if isinstance(x, LazyMatrix):
        return any(has_graph(part) for part in (x.left, x.right, *(part for term in x.terms for part in term)))
    if not isinstance(x, Tensor):
        return False
    if torch.compiler.is_compiling():
        return x.requires_grad or is_mapped()  # the compiler cannot look inside; a graph too long is no wrong number
    return within_vmap(x).requires_grad
