"""Gradients of single examples in parameters that are layers as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.by_autograd import constant
from lrkfac.core.base.leaves import tree_flatten, tree_unflatten
from lrkfac.core.base.memory import memory_of
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.derivatives import transposed
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.jacobians import each_example
from lrkfac.core.likelihoods.joint import longest_head

ProbeGradients = Mapping[str, Sequence[Tensor]]
"""For each source, the gradient at the probe of each of its uses."""


EXAMPLES_AT_ONCE = 32
"""Examples whose cotangents go back through the whole batch at once, where the model is not mapped over examples."""


def examples_of_uses(layers: Layers, outputs: Sequence[Tensor], uses: int) -> list[int]:
    """Return how many examples each use of a whole parameter has: all, or those of each head with its own.

    Outputs beside the likelihood's heads count as uses when layers are found, and have no example here.
    """
    if not layers.own:
        return [outputs[0].shape[0]]
    return [*[f.shape[0] for f in outputs], *[0] * (uses - len(outputs))]


def example_transpose(
    objective: Objective, layers: Layers, params: Tree, inputs: Tree, outputs: Sequence[Tensor]
) -> Callable[[list[Tensor]], ProbeGradients]:
    """Return the function from a cotangent of the outputs to the gradients of single examples, ``[N, *shape]`` each.

    Heads with examples of their own are uses of their own, with the gradients of as many examples as they have.
    Other arguments and errors are those of ``_example_transpose``.
    """
    whole = _example_transpose(objective, layers, params, inputs, outputs)
    if not (layers.own and layers.jacobians):
        return whole
    lengths = {layer.sites[0][0]: examples_of_uses(layers, outputs, len(layer.sites)) for layer in layers.jacobians}

    def of_heads(cotangent: list[Tensor]) -> ProbeGradients:
        every: dict[str, list[Tensor]] = {name: [] for name in lengths}
        for head in range(len(outputs)):
            of_head = whole([c if i == head else torch.zeros_like(c) for i, c in enumerate(cotangent)])
            for name, (g,) in of_head.items():
                every[name].append(g)
        return {
            name: [g[:length] for g, length in zip_longest(gs, lengths[name], fillvalue=gs[0])]
            for name, gs in every.items()
        }

    return of_heads


def _example_transpose(
    objective: Objective, layers: Layers, params: Tree, inputs: Tree, outputs: Sequence[Tensor]
) -> Callable[[list[Tensor]], ProbeGradients]:
    """Return the function from a cotangent of the outputs to the gradients of single examples, ``[N, *shape]`` each.

    Each example has a copy of the parameters of its own, by which one backward pass of the model mapped over examples
    differentiates. Where that cannot be (``layers.alone``), the cotangent of each example goes back through the whole
    batch, ``N`` times the operations.

    Args:
        objective: The model and its likelihood.
        layers: Those captured.
        params: Where to evaluate.
        inputs: Of the batch.
        outputs: Of each head.

    Returns:
        The function; of nothing where no parameter is a layer as a whole.

    Raises:
        ValueError: If the model has other outputs for one example alone than in a batch.
    """
    leaves, structure = tree_flatten(params)
    if layers.autograd:  # whose model may change inputs into leaves
        leaves, inputs = constant(leaves), constant(inputs)
    indices = [layer.weight.index for layer in layers.jacobians]
    sources = [layer.sites[0][0] for layer in layers.jacobians]
    number, chosen = longest_head(list(outputs)).shape[0], [leaves[i] for i in indices]
    if not chosen or not number:
        return lambda cotangent: {name: [x.new_zeros(0, *x.shape)] for name, x in zip(sources, chosen, strict=True)}

    def run(own: list[Tensor], some: Tree) -> list[Tensor]:
        merged = list(leaves)
        for i, leaf in zip(indices, own, strict=True):
            merged[i] = leaf
        return objective.outputs(tree_unflatten(structure, merged), some)

    def mapped(own: list[Tensor]) -> tuple[list[Tensor], Tree]:
        each = each_example(run, own, inputs, layers.batch_axes or (), number)
        return [x.flatten(0, 1)[: len(f)] for x, f in zip(each, outputs, strict=True)], []

    if layers.alone:
        found, back, _ = transposed(mapped, [leaf.expand(number, *leaf.shape) for leaf in chosen], layers.autograd)
        shapes = [tuple(x.shape) for x in found], [tuple(x.shape) for x in outputs]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model: expected outputs of the shapes {shapes[1]} from its examples one by one, as in a batch, got "
                f"{shapes[0]}; describe the layers again with find_layers() for inputs like these"
            )
        return lambda cotangent: {name: [g] for name, g in zip(sources, back(cotangent), strict=True)}
    _, back, _ = transposed(lambda own: (run(own, inputs), []), chosen, layers.autograd)
    numbers = torch.arange(number, device=outputs[0].device)

    def of_examples(cotangent: list[Tensor]) -> ProbeGradients:
        of_one = lambda n: list(back([_only(n, x) for x in cotangent]))  # noqa: E731
        gradients = vmap(of_one, chunk_size=EXAMPLES_AT_ONCE)(numbers)
        return {name: [g] for name, g in zip(sources, gradients, strict=True)}

    return of_examples


def _only(n: Tensor, x: Tensor) -> Tensor:
    """Return a cotangent with zeros for all examples but one."""
    is_one = (torch.arange(len(x), device=x.device) == n).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(is_one, x, 0)


def check_memory(layers: Layers, outputs: Sequence[Tensor], columns: int) -> None:
    """Raise ``ValueError`` if the gradients of single examples take more than the memory of the device."""
    if torch.compiler.is_compiling():
        return
    examples, device = longest_head(list(outputs)).shape[0], outputs[0].device
    size = sum(math.prod(one.weight.shape) * one.weight.dtype.itemsize for one in layers.jacobians)
    memory, needed = memory_of(device), size * examples * columns
    if memory is not None and needed > memory:
        raise ValueError(
            f"inputs: the gradients of {examples} examples in {len(layers.jacobians)} parameters that are layers of "
            f'the kind "jacobian", for {columns} columns each, take {needed:,} bytes, more than the {memory:,} of '
            f'{device}; evaluate fewer examples, take estimator="mc" with few samples, or call find_layers() with '
            'uncovered="plain"'
        )
