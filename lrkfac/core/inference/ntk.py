"""The empirical neural tangent kernel, by the rows of layers where there are some, else by products with Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from lrkfac.core.base.arguments import check_integer, check_model, check_values
from lrkfac.core.base.autograd import recording
from lrkfac.core.base.containers import with_opened_inputs
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.leaves import tree_flatten, tree_unflatten
from lrkfac.core.base.tree_checks import check_like, check_tree
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.examples import example_gradients, has_rows_of_numbers, rows_by_example
from lrkfac.core.inference.rows import output_derivatives
from lrkfac.core.layers.description import Layer, Layers, check_layers
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.layers.statistics import Statistics, Uses

Outputs = Callable[[Tree, Tree], Tensor]


@dataclass(frozen=True)
class TangentKernel:
    """The function from parameters and two batches to the kernel; ``ntk`` makes it.

    Attributes:
        model: Pure function ``model(params, inputs)``.
        layers: Those whose rows are used.
        chunk: Number of outputs that go through the model at once, where there are no rows.
    """

    model: Callable[[Tree, Tree], Any]
    layers: Layers | None
    chunk: int

    def __call__(self, params: Tree, x1: Tree, x2: Tree | None = None) -> Tensor:
        """Return ``J(x1) J(x2)ᵀ``, of shape ``[N1, *outputs, N2, *outputs]``.

        Args:
            params: A tree of floating-point tensors; with layers, one like that which ``find_layers`` saw.
            x1: Inputs of the first batch.
            x2: Inputs of the second batch; by default the first.

        Raises:
            ValueError: If the parameters are not those of the layers, or a tensor is on the device "meta".
            TypeError: If a parameter is no floating-point tensor, or the model returns something else than a tensor.
        """
        check_tree(params, "params")
        check_values(params=params, x1=x1, x2=x2)
        if self.layers is not None:
            check_like(self.layers.tree, params, "params")
        with recording(False):
            leaves, structure = tree_flatten(params)
            first, second = self._outputs(params, x1), None if x2 is None else self._outputs(params, x2)
            covered = self.layers.covered if self.layers is not None and self.layers.independent else frozenset()
            shape = (*first.shape, *(first if second is None else second).shape)
            kernel = wide(first).new_zeros(first.numel(), (first if second is None else second).numel())
            if self.layers is not None and covered:
                batches = [(x, y) for x, y in ((x1, first), (x2, second)) if y is not None]
                rows = [output_derivatives(self.model, self.layers, params, x, y) for x, y in batches]
                kernel = kernel + sum(_layer_kernel(layer, rows[0], rows[-1]) for layer in self.layers)
            free = [i for i in range(len(leaves)) if i not in covered]
            if free:

                def outputs(some: list[Tensor], inputs: Tree) -> Tensor:
                    whole = list(leaves)
                    for i, leaf in zip(free, some, strict=True):
                        whole[i] = leaf
                    return self._outputs(tree_unflatten(structure, whole), inputs)

                kernel = kernel + self._by_products(outputs, [leaves[i] for i in free], x1, x1 if x2 is None else x2)
            return kernel.reshape(shape)

    def _outputs(self, params: Tree, inputs: Tree) -> Tensor:
        model, opened = with_opened_inputs(self.model, inputs)
        outputs = model(params, opened)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or not outputs.ndim:
            got = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(f"model: expected outputs as one floating-point tensor with a batch axis, got {got}")
        return outputs

    def _by_products(self, outputs: Any, leaves: list[Tensor], x1: Tree, x2: Tree) -> Tensor:
        """Return the kernel of some leaves: a column for each output of the second batch."""
        of_second, back = vjp(lambda some: outputs(some, x2), leaves)

        def column(cotangent: Tensor) -> Tensor:
            (gradient,) = back(cotangent.reshape(of_second.shape))
            return jvp(lambda some: outputs(some, x1), (leaves,), (gradient,))[1].reshape(-1)

        units = torch.eye(of_second.numel(), dtype=of_second.dtype, device=of_second.device)
        return wide(torch.cat([vmap(column)(part) for part in units.split(self.chunk)]).mT)


def ntk(model: Callable[[Tree, Tree], Any], layers: Layers | None = None, chunk: int = 32) -> TangentKernel:
    """Return the empirical neural tangent kernel ``J(x1) J(x2)ᵀ`` as a function of parameters and two batches.

    ``J`` is the derivative of the outputs in the parameters (Jacot, Gabriel & Hongler 2018, arXiv 1806.07572), ``K``
    the number of outputs of an example.

    With ``layers``, rows suffice for a layer that is used once for each example: an entry is
    ``(g₁ᵀ g₂) (a₁ᵀ a₂)``, and all take ``N² d_in + N² K² d_out`` operations and ``K`` backward passes, no gradient
    formed. Layers with several positions take the gradients of single examples, ``N K d_in d_out`` numbers. Parameters
    that no layer covers, and all without ``layers`` or where outputs depend on other examples, take ``N2 K`` backward
    passes and forward derivatives, ``chunk`` at once, with the memory of as many gradients (products of both as in
    Novak, Sohl-Dickstein & Schoenholz 2022, arXiv 2206.08720).

    Args:
        model: Pure function ``model(params, inputs)`` that returns one tensor with the batch in front.
        layers: From ``find_layers``.
        chunk: Number of outputs that go through the model at once, where there are no rows.

    Returns:
        ``kernel(params, x1, x2=None)``, which returns ``[N1, *outputs, N2, *outputs]``.

    Raises:
        ValueError: If ``chunk`` is below 1.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x1, x2 = {"w": torch.zeros(3, 1)}, torch.ones(2, 3), torch.ones(4, 3)
        >>> kernel = lrkfac.curvature.ntk(model, lrkfac.find_layers(model, params, x1))
        >>> kernel(params, x1, x2).shape, kernel(params, x1, x2)[0, 0, 0, 0]
        (torch.Size([2, 1, 4, 1]), tensor(3.))
    """
    check_model(model)
    if layers is not None:
        check_layers(layers)
    check_integer(chunk, "chunk")
    return TangentKernel(model, layers, chunk)


def _layer_kernel(layer: Layer, first: Statistics, second: Statistics) -> Tensor:
    """Return the part of one layer, ``[N1 K, N2 K]``."""
    both = [_groups(layer, statistics) for statistics in (first, second)]
    kernels = [_group_kernel(layer, *chain(*pair)) for pair in zip(*both, strict=True)]
    return torch.stack(kernels).sum(dim=0)


def _groups(layer: Layer, statistics: Statistics) -> list[tuple[Uses, Uses]]:
    """Return inputs and gradients of each group of a layer."""
    uses = statistics.inputs[layer.name], statistics.output_gradients[layer.name]
    if layer.groups == 1:
        return [uses]
    split = [split_groups(layer, x) for x in uses]
    return [tuple([tuple([x[group] for x in of]) for of in split]) for group in range(layer.groups)]  # type: ignore[misc]


def _group_kernel(layer: Layer, a1: Uses, g1: Uses, a2: Uses, g2: Uses) -> Tensor:
    pairs = [_single_rows(layer, a1, g1), _single_rows(layer, a2, g2)]
    if None not in pairs:
        (x1, y1), (x2, y2) = (pair for pair in pairs if pair is not None)
        of_gradients = torch.einsum("kno,lmo->nkml", y1, y2)
        kernel = (x1 @ x2.mT)[:, None, :, None] * of_gradients
        return kernel.flatten(2).flatten(0, 1)
    rows = [example_gradients(layer, a, g).transpose(0, 1).flatten(2).flatten(0, 1) for a, g in ((a1, g1), (a2, g2))]
    return rows[0] @ rows[1].mT


def _single_rows(layer: Layer, inputs: Uses, gradients: Uses) -> tuple[Tensor, Tensor] | None:
    """Return ``a`` ``[N, d_in]`` and ``g`` ``[k, N, d_out]`` of a layer with one position, else ``None``."""
    if len(inputs) > 1 or not has_rows_of_numbers(layer):
        return None
    a, g = rows_by_example(layer, inputs, gradients)
    return (a[:, 0], g[:, :, 0]) if a.shape[1] == 1 else None
