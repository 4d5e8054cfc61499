"""Parameters that no operation covers as layers of their own, by the derivatives of single examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.by_autograd import attached, constant
from lrkfac.core.base.containers import result_leaves
from lrkfac.core.base.dtypes import most_precise
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.describing import WITHOUT_DERIVATIVE
from lrkfac.core.layers.description import Layer, Layers, Parameter
from lrkfac.core.layers.generic import generic_parameters
from lrkfac.core.layers.kinds import JACOBIAN
from lrkfac.core.layers.movement import comparable
from lrkfac.core.layers.placement import IN_FRONT


def with_jacobians(layers: Layers, model: Callable[[Tree, Tree], Any], params: Tree, inputs: Tree) -> Layers:
    """Return the layers, and one of the kind "jacobian" for each parameter that the model uses and they do not cover.

    Raises:
        ValueError: If an example has no outputs of its own, which depend on no other one.
    """
    used = [p for p, reason in layers.uncovered if reason not in WITHOUT_DERIVATIVE]
    if not used:
        return layers
    reasons = {
        "depend on others": layers.independent is False,
        "may depend on others": layers.independent is None,
        "are several entries of the leading axis": not layers.single,
        "have no known axis in the inputs": not layers.batch_axes,
    }
    if any(reasons.values()):
        reason = next(reason for reason, holds in reasons.items() if holds)
        raise ValueError(
            f'uncovered: expected "plain" for a model whose outputs of one example {reason}, got "jacobian", for which '
            "each example has a derivative of its own"
        )
    uses = len(result_leaves(model(params, inputs))) if layers.own else 1
    return replace(
        layers,
        layers=(*layers.layers, *[_layer(p, uses) for p in used]),
        uncovered=tuple([(p, reason) for p, reason in layers.uncovered if reason in WITHOUT_DERIVATIVE]),
        alone=_runs_alone(model, params, inputs, layers.batch_axes or ()),
    )


def each_example(
    function: Callable[[Any, Tree], list[Tensor]],
    variables: list[Tensor],
    inputs: Tree,
    axes: Sequence[tuple[str, int]],
    number: int,
) -> list[Tensor]:
    """Return a function of single examples, each in a batch of its own, with the examples in front.

    Where heads have examples of their own, the last ones of a shorter batch stand for those that it lacks.

    Args:
        function: ``function(variables, inputs)`` of one example.
        variables: With a leading axis for the examples.
        inputs: Of the batch.
        axes: The axis of the batch of each leaf that has one, by path.
        number: Of examples.
    """
    leaves, structure = optree.tree_flatten(inputs)
    by_path, names = dict(axes), paths(inputs)
    mapped = [i for i, name in enumerate(names) if name in by_path]
    stacked = []
    for i in mapped:
        axis, x = by_path[names[i]], leaves[i]
        index = torch.arange(number, device=x.device).clamp(max=x.shape[axis] - 1)
        stacked.append(x.index_select(axis, index).movedim(axis, 0))

    def one(own: list[Tensor], some: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for i, x in zip(mapped, some, strict=True):
            filled[i] = x.unsqueeze(by_path[names[i]])
        return function(own, optree.tree_unflatten(structure, filled))

    return list(vmap(one)(variables, stacked))


def _runs_alone(
    model: Callable[[Tree, Tree], Any], params: Tree, inputs: Tree, axes: Sequence[tuple[str, int]]
) -> bool:
    """Return whether outputs of the batch are those of its examples one by one, which ``vmap`` can take."""
    by_path, leaves = dict(axes), _leaves(inputs)
    number = max([2, *[leaves[path].shape[axis] for path, axis in by_path.items()]])
    inputs = constant(_lengthened(inputs, by_path))
    parameters, structure = optree.tree_flatten(attached(generic_parameters(params)))

    def tensors(own: list[Tensor], some: Tree) -> list[Tensor]:
        result = result_leaves(model(optree.tree_unflatten(structure, own), some))
        return [x for x in result if isinstance(x, Tensor) and x.ndim]

    try:
        whole = tensors(parameters, inputs)
        each = each_example(tensors, [p.expand(number, *p.shape) for p in parameters], inputs, axes, number)
        pairs = [(x, y.flatten(0, 1)[: len(x)]) for x, y in zip(whole, each, strict=True) if y.ndim > 1]
        alike = len(pairs) == len(whole) and all(
            x.shape == y.shape and x.requires_grad == y.requires_grad and _close(x, y, (0,)) for x, y in pairs
        )
        pairs = [(x, y) for x, y in pairs if x.requires_grad]
        gradients = [
            torch.autograd.grad(_spread(side), parameters, allow_unused=True) for side in zip(*pairs, strict=True)
        ]
    except Exception:
        return False  # such as an operation in place on a tensor that vmap does not know
    return alike and all(
        (x is None) == (y is None) and (x is None or y is None or _close(x, y, tuple(range(x.ndim))))
        for x, y in zip(*gradients, strict=True)
    )


def _spread(outputs: Sequence[Tensor]) -> Tensor:
    """Return a sum of outputs with a weight of its own for each, which no symmetry of the model cancels."""
    real = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in outputs]
    weights = [torch.arange(x.numel(), device=x.device).to(torch.float32).cos().reshape(x.shape) for x in real]
    return torch.stack([(x.to(most_precise(x.device)) * w).sum() for x, w in zip(real, weights, strict=True)]).sum()


def _close(x: Tensor, y: Tensor, axes: tuple[int, ...]) -> bool:
    """Return whether two results of the same numbers agree to rounding, relative to the largest along axes."""
    if not x.numel():
        return True
    bound = torch.finfo(x.dtype if x.is_floating_point() or x.is_complex() else torch.float32).eps ** 0.6
    x, y = comparable(x), comparable(y)
    return bool(((x - y).abs() <= bound * x.abs().amax(axes, keepdim=True)).all())


def _lengthened(inputs: Tree, axes: Mapping[str, int]) -> Tree:
    """Return inputs of two examples at least, of which one alone would show nothing."""
    leaves, structure = optree.tree_flatten(inputs)
    for i, name in enumerate(paths(inputs)):
        if name in axes and leaves[i].shape[axes[name]] == 1:
            leaves[i] = leaves[i].repeat_interleave(2, dim=axes[name])
    return optree.tree_unflatten(structure, leaves)


def _leaves(inputs: Tree) -> dict[str, Any]:
    return dict(zip(paths(inputs), optree.tree_leaves(inputs), strict=True))


def _layer(parameter: Parameter, uses: int) -> Layer:
    """Return the layer of a whole parameter; heads with examples of their own are a use each."""
    return Layer(
        name=parameter.path,
        kinds=(JACOBIAN.name,) * uses,
        weight=parameter,
        bias=None,
        d_in=1,
        d_out=math.prod(parameter.shape),
        groups=1,
        options=((),) * uses,
        sites=tuple([(parameter.path, use) for use in range(uses)]),
        placements=(IN_FRONT,) * uses,
    )
