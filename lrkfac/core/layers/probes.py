"""Probes: broadcast zeros to add to the outputs of layers, and the shapes that they must have."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.private_torch import fake_mode
from lrkfac.core.base.recording import attached, recording
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.purity import without_random_numbers
from lrkfac.core.layers.tracing import run_captured


class OutputSpec(NamedTuple):
    """Shape, dtype and device of a probe."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def output_specs(
    model: Callable[[Tree, Tree], Any], layers: Layers, params: Tree, inputs: Tree
) -> dict[str, list[OutputSpec]]:
    """Return shape, dtype and device of every layer's output, by one forward pass without computation.

    In eager mode the pass sees fake tensors; under the compiler the true ones, whose computation the compiler removes
    as dead code. An output that stands for all examples (positions) is repeated for each, so that their gradients stay
    apart.

    Raises:
        ValueError: If the model cannot take a repeated output.
    """
    if torch.compiler.is_compiling():
        result, records = run_captured(model, layers, params, inputs)
    elif layers.autograd:
        with recording(), fake_mode(), without_random_numbers():
            result, records = run_captured(model, layers, attached(like_fake(params)), like_fake(inputs), guarded=True)
    else:
        with fake_mode(), without_random_numbers():
            result, records = run_captured(model, layers, like_fake(params), like_fake(inputs), guarded=True)
    n = batch_size(result)
    specs = {
        source: [OutputSpec(repeated(tuple(r.output.shape), n), r.output.dtype, r.output.device) for r in uses]
        for source, uses in records.items()
    }
    shared = [k for k, uses in records.items() if [r.output.shape for r in uses] != [s.shape for s in specs[k]]]
    if shared and not torch.compiler.is_compiling():
        expected = _shapes(result)
        try:
            with fake_mode():
                shapes = _shapes(
                    run_captured(model, layers, like_fake(params), like_fake(inputs), zero_probes(specs))[0]
                )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(_NOT_REPEATED.format(shared)) from error
        if shapes != expected:
            raise ValueError(_NOT_REPEATED.format(shared))
    return specs


_NOT_REPEATED = (
    "model: the weights {} are applied to one row for all examples (an axis of length 1 in front), and the model "
    "cannot take the result once for each example; expand the input over the batch, or leave that axis away: the "
    "weight is then not covered"
)


def _shapes(result: Any) -> list[torch.Size]:
    return [x.shape for x in optree.tree_leaves(result) if isinstance(x, Tensor)]


def batch_size(result: Any) -> int:
    """Return the length of the leading axis of a model's first output; the model may return outputs and more.

    Raises:
        TypeError: If the model returns something else.
    """
    leaves = optree.tree_leaves(result)
    if not leaves or not isinstance(leaves[0], Tensor):
        kind = type(leaves[0] if leaves else result).__name__
        raise TypeError(f"model: expected outputs as a tensor or a tree that starts with one, got {kind}")
    return leaves[0].shape[0] if leaves[0].ndim else 1


def repeated(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return the shape with ``n`` examples where it has one for all of them."""
    return (n, *shape[1:]) if shape and shape[0] == 1 else shape


def zero_probes(specs: dict[str, list[OutputSpec]], sources: Container[str] | None = None) -> dict[str, list[Tensor]]:
    """Return probes, which take no memory, for all sources or some."""
    return {
        source: [torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in uses]
        for source, uses in specs.items()
        if sources is None or source in sources
    }


def like_fake(tree: Tree) -> Tree:
    """Return a tree of tensors without values, of equal shapes, dtypes and devices; to be called in ``fake_mode``."""
    return optree.tree_map(
        lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x, tree
    )
