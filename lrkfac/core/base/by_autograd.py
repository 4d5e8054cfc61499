"""Trees whose history ``torch.autograd`` records, for models that ``torch.func`` cannot differentiate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.private_torch import transformation_level
from lrkfac.core.base.types import Tree


@contextmanager
def autograd_enabled() -> Iterator[None]:
    """Run a block in which ``torch.autograd`` records.

    Raises:
        ValueError: Inside a transformation of ``torch.func`` or ``torch.compile``, where it does not.
    """
    if torch.compiler.is_compiling() or transformation_level() is not None:
        raise ValueError(
            "model: its derivatives are taken by torch.autograd, since it does what torch.func refuses (it calls "
            "torch.autograd.grad, or a torch.autograd.Function without setup_context): evaluate it outside of "
            "torch.compile and torch.func, or use torch.func.grad and setup_context in the model"
        )
    with torch.inference_mode(False), torch.enable_grad():
        yield


def attached(tree: Tree) -> Tree:
    """Return a tree of the same values of which ``torch.autograd`` records what depends on them."""
    return optree.tree_map(lambda x: x.requires_grad_(), constant(tree))


def constant(tree: Tree) -> Tree:
    """Return a tree of the same values, whose tensors have no history."""
    with torch.inference_mode(False):
        return optree.tree_map(_constant, tree)


def _constant(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.clone() if x.is_inference() else x.detach()
