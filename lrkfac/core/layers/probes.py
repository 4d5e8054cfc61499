"""Probes: broadcast zeros to add to the outputs of layers, and the shapes that they must have."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import nullcontext
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.by_autograd import attached, autograd_enabled
from lrkfac.core.base.containers import REMEDY, described, result_leaves
from lrkfac.core.base.private_torch import fake_mode
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.purity import without_random_numbers
from lrkfac.core.layers.tracing import Recorded, run_captured


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
    compiling = torch.compiler.is_compiling()
    if compiling:
        result, records = run_captured(model, layers, params, inputs)
    else:
        result, records = _run_without_values(model, layers, params, inputs)
    n = layers.examples(inputs) or batch_size(result)
    shared = {
        site
        for layer in layers
        for site, place in zip(layer.sites, layer.placements, strict=True)
        if place is not None and place[1].shared
    }

    def spec(source: str, number: int, output: Tensor) -> OutputSpec:
        shape = (n, *output.shape[1:]) if (source, number) in shared else tuple(output.shape)
        return OutputSpec(shape, output.dtype, output.device)

    specs = {source: [spec(source, i, r.output) for i, r in enumerate(uses)] for source, uses in records.items()}
    if shared and not compiling:
        expected = _shapes(result)
        try:
            shapes = _shapes(_run_without_values(model, layers, params, inputs, specs)[0])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(_NOT_REPEATED.format(sorted({source for source, _ in shared}))) from error
        if shapes != expected:
            raise ValueError(_NOT_REPEATED.format(sorted({source for source, _ in shared})))
    return specs


def _run_without_values(
    model: Callable[[Tree, Tree], Any],
    layers: Layers,
    params: Tree,
    inputs: Tree,
    specs: dict[str, list[OutputSpec]] | None = None,
) -> tuple[Any, dict[str, list[Recorded]]]:
    """Return what ``run_captured`` does on fake tensors, with probes of the given shapes."""
    with autograd_enabled() if layers.autograd else nullcontext(), fake_mode(), without_random_numbers():
        params, inputs = like_fake(params), like_fake(inputs)
        params = attached(params) if layers.autograd else params
        probes = None if specs is None else zero_probes(specs)
        return run_captured(model, layers, params, inputs, probes, guarded=True)


_NOT_REPEATED = (
    "model: the weights {} are applied to one row for all examples (an axis of length 1 in front), and the model "
    "cannot take the result once for each example; expand the input over the batch, or leave that axis away: the "
    "weight is then not covered"
)


def _shapes(result: Any) -> list[torch.Size]:
    return [x.shape for x in result_leaves(result) if isinstance(x, Tensor)]


def batch_size(result: Any) -> int:
    """Return the length of the leading axis of a model's first output; the model may return outputs and more.

    Raises:
        TypeError: If the model returns something else.
    """
    leaves = result_leaves(result)
    if not leaves or not isinstance(leaves[0], Tensor):
        kind = described(leaves[0] if leaves else result)
        raise TypeError(f"model: expected outputs as a tensor or a tree that starts with one, got {kind}; {REMEDY}")
    return leaves[0].shape[0] if leaves[0].ndim else 1


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
