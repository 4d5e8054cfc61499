"""A block of the Fisher matrix: some layers and what holds them. Here the capture and the linear algebra meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating, floating_dtype, widest
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.trees import materialize
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.covariances import factors
from lrkfac.core.curvature.ekfac import CorrectedStructure
from lrkfac.core.curvature.exact import BlockStructure
from lrkfac.core.curvature.examples import ExampleGradients, example_gradients
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.layers.description import Layer, Layers
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.layers.statistics import Statistics, Uses
from lrkfac.core.linalg.operators import mean_eigenvalue


def init(block: Block, leaves: list[Tensor] | dict[int, Tensor], dtype: torch.dtype | None = None) -> Any:
    """The averages before the first statistics, in a dtype; by default that of the parameters, at least float32."""
    layer = block.layers[0]
    like = leaves[layer.weight.index].new_empty((), dtype=dtype or dtype_of(block, leaves))
    if _per_model(block):
        whole = sum(one.groups * one.d_out * one.d_in for one in block.layers)
        return block.structure.init(1, whole, like)
    state = block.structure.init(layer.d_in, layer.d_out, like)
    if layer.groups == 1:
        return state
    return optree.tree_map(lambda x: x.expand(layer.groups, *x.shape).clone(), state)


def dtype_of(block: Block, leaves: list[Any] | dict[int, Any]) -> torch.dtype:
    """The dtype of averages that are held in that of the parameters, or of gradients."""
    found = widest(*[leaves[layer.weight.index].dtype for layer in block.layers])
    return found if found in (torch.float32, torch.float64) else torch.float32


def form(state: Any) -> Any:
    """What tells states apart: types, names and shapes, in nested tuples."""
    if isinstance(state, Tensor):
        return tuple(state.shape)
    inner = tuple([form(part) for part in state]) if isinstance(state, tuple) else ()
    return (type(state).__name__, *inner)


def forms(held: tuple[Block, ...], layers: Layers) -> dict[str, Any]:
    """The form of each block's averages."""
    leaves = [torch.empty(parameter.shape, device="meta") for parameter in layers.parameters]
    return {block.name: form(init(block, leaves)) for block in held}


def check_averages(expected: Mapping[str, Any], factors: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuses averages of other blocks.

    Raises:
        ValueError: Names the layer that is missing, unexpected or held in another way or dtype.
    """
    remedy = "pass what init() or the last update() of this transformation returned"
    if not isinstance(factors, dict) or set(factors) != set(expected):
        names = sorted(factors) if isinstance(factors, dict) else type(factors).__name__
        raise ValueError(f"state: expected averages of the layers {sorted(expected)}, got {names}; {remedy}")
    for name, wanted in expected.items():
        found = form(factors[name])
        if found != wanted:
            raise ValueError(f"state: expected averages of layer {name!r} in the form {wanted}, got {found}; {remedy}")
        if (held := floating_dtype(factors[name])) != dtypes[name]:
            raise ValueError(
                f"state: expected averages of layer {name!r} in {dtypes[name]}, got {held}; {remedy}, or give the "
                "transformation that dtype="
            )


class Held(NamedTuple):
    """Of a block: its averages, their damped inverse, and the dampings in it, see ``PreconditionState``."""

    state: Any
    inverse: Any
    dampings: Any


def identity(block: Block, state: Any) -> Held:
    """What is held before the first statistics: averages that are zero, with damping 1."""
    return Held(state, *_by_group(block, lambda one: inverted(block, one, 1.0))(state))


def inverted(block: Block, state: Any, damping: float | Tensor) -> tuple[Any, Tensor]:
    """The inverse of an average, and the dampings in it."""
    damping = floating(damping, floating_dtype(state))  # scalars of two dtypes would make the wider one of vectors
    with profiled("inverse"):
        return block.structure.inverse(state, damping), block.structure.dampings(state, damping)


def refresh(block: Block, held: Held, statistics: Statistics, damping: float | Tensor, decay: float | Tensor) -> Held:
    """New averages and their inverses; the last ones where there are no statistics, or of a scale or shift where there
    are no output gradients. Statistics are reduced in the dtype of the averages.

    Normalised inputs have the second moment 1: with ``B = I``, the identity is what the block of a scale would be.

    Raises:
        ValueError: If the statistics are those of other layers, or have no gradients where the structure needs them.
    """
    for layer in block.layers:
        if layer.name not in statistics.inputs:
            raise ValueError(
                f"evaluation: no statistics of layer {layer.name!r}; make evaluator() and the transformation from the "
                "same layers"
            )
    left_out = [layer.name for layer in block.layers if not statistics.inputs[layer.name]]
    if len(left_out) == len(block.layers):
        return held
    if left_out:
        raise ValueError(f"statistics: full() holds all layers together and cannot do without those of {left_out}")
    statistics = _in_dtype(block, statistics, floating_dtype(held.state))
    structure, scale = block.structure, statistics.scale
    exact = not isinstance(structure, KroneckerStructure)
    if exact and not statistics.output_gradients[block.layers[0].name]:
        if block.implied:
            return held
        kind = "an exact" if isinstance(structure, BlockStructure) else "a corrected"
        raise ValueError(
            f"structure: layer {block.layers[0].name!r} is held by {kind} block, which needs the "
            'gradients at the layer\'s outputs: the estimator "forward_only" takes none; use kronecker(...), '
            "uncorrected, or another estimator"
        )
    if _per_model(block):
        assert isinstance(structure, BlockStructure)
        rows = [_example_rows(layer, statistics).flatten(1) for layer in block.layers]
        new = structure.update(held.state, torch.cat(rows, dim=1)[:, :, None], scale, decay)
        return Held(new, *inverted(block, new, damping))
    (layer,) = block.layers
    inputs = split_groups(layer, statistics.inputs[layer.name])
    gradients = split_groups(layer, statistics.output_gradients[layer.name])

    def one_group(state: Any, inputs: Uses, gradients: Uses) -> Held:
        if isinstance(structure, KroneckerStructure):
            both = factors(layer, inputs, gradients, scale, structure.treatment)
            new: Any = structure.update(state, *both, decay)
        elif isinstance(structure, CorrectedStructure):
            both = factors(layer, inputs, gradients, scale, structure.factors.treatment)
            new = structure.update(state, *both, ExampleGradients(layer, inputs, gradients, scale), decay)
        else:
            rows = example_gradients(layer, inputs, gradients).flatten(0, 1)
            new = structure.update(state, rows, scale, decay)
        return Held(new, *inverted(block, new, damping))

    try:
        return _by_group(block, one_group)(held.state, inputs, gradients)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"layer {layer.name!r}: no inverse of its factors: its statistics, or damping or decay where they are "
            f"tensors, are not finite or out of range ({error})"
        ) from error


def size(block: Block, state: Any) -> Tensor:
    """The mean eigenvalue of an average, ``[]``; where there is one for each group or unit, the mean of all."""
    structure = block.structure
    operator = structure.factor.operator if isinstance(structure, BlockStructure) else structure.operator
    return _by_group(block, lambda one: mean_eigenvalue(operator(one)))(state).mean()


def apply(block: Block, inverse: Any, matrices: list[Any]) -> list[Tensor]:
    """The layers' natural gradients as matrices, from their gradients as matrices, in the dtype of these.

    It is computed in the wider one of it and that of the inverse.
    """
    matrices = materialize(matrices)
    held = floating_dtype(inverse)
    wider = widest(held, *[m.dtype for m in matrices])
    if held != wider:
        inverse = optree.tree_map(lambda x: x.to(wider), inverse)
    if _per_model(block):
        flat = torch.cat([matrix.reshape(-1).to(wider) for matrix in matrices])
        parts = inverse.matvec(flat).split([matrix.numel() for matrix in matrices])
        return [part.reshape(m.shape).to(m.dtype) for part, m in zip(parts, matrices, strict=True)]
    (matrix,) = matrices
    natural = _by_group(block, block.structure.apply)(inverse, matrix.to(wider))
    return [natural.contiguous().to(matrix.dtype)]


def packed(wanted: Iterable[tuple[Any, int, int]]) -> list[list[int]]:
    """Numbers of what is stacked, in the order of the first of each list.

    Args:
        wanted: The form that what is stacked has in common (``None`` for what stays alone), the size, and how large a
            stack with it may be.
    """
    found: list[tuple[Any, int, list[int]]] = []
    for i, (form, size, largest) in enumerate(wanted):
        for j, (other, stacked, numbers) in enumerate(found):
            if form is not None and form == other and stacked + size <= largest:
                found[j] = (other, stacked + size, [*numbers, i])
                break
        else:
            found.append((form, size, [i]))
    return [numbers for _, _, numbers in found]


def _in_dtype(block: Block, statistics: Statistics, dtype: torch.dtype) -> Statistics:
    """Those of a block's layers, in a dtype."""
    names = [layer.name for layer in block.layers]
    inputs, gradients = ({n: tuple([floating(x, dtype) for x in of[n]]) for n in names} for of in statistics[:2])
    return Statistics(inputs, gradients, statistics.scale.to(dtype))


def _per_model(block: Block) -> bool:
    return isinstance(block.structure, BlockStructure) and block.structure.per == "model"


def _by_group(block: Block, function: Callable[..., Any]) -> Callable[..., Any]:
    if _per_model(block) or block.layers[0].groups == 1:
        return function
    # Contiguous, whatever vmap returns: a compiled update is compiled again where a state's strides change.
    return lambda *args: optree.tree_map(lambda x: x.contiguous(), vmap(function)(*args))


def _example_rows(layer: Layer, statistics: Statistics) -> Tensor:
    """Examples' gradients ``[k n, groups d_out d_in]`` of all groups of a layer."""
    inputs = split_groups(layer, statistics.inputs[layer.name])
    gradients = split_groups(layer, statistics.output_gradients[layer.name])
    if layer.groups == 1:
        return example_gradients(layer, inputs, gradients).flatten(0, 1)
    grouped = vmap(lambda a, g: example_gradients(layer, a, g))(inputs, gradients)
    return grouped.permute(1, 2, 0, 3, 4).flatten(0, 1)
