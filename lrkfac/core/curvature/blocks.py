"""The state of a block of the Fisher matrix: running average, damped inverse, dampings; and its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import floating, floating_dtype, widest
from lrkfac.core.base.profiling import profiled
from lrkfac.core.curvature.assignment import Block
from lrkfac.core.curvature.protocol import BlockStructure
from lrkfac.core.layers.description import Layers


class BlockState(NamedTuple):
    """State of one block between steps; tensors have a leading axis for groups.

    Attributes:
        average: The running average, as the block's structure represents it.
        inverse: The damped inverse as of the last statistics.
        dampings: Dampings in the inverse: ``δ_B`` and ``δ_A`` of a product, ``[2]``, else ``λ``,
            ``[]``.
    """

    average: Any
    inverse: Any
    dampings: Tensor


def initial_state(
    block: Block, leaves: list[Tensor] | dict[int, Tensor], dtype: torch.dtype | None = None
) -> BlockState:
    """Return the state before the first statistics: an average that is zero, with damping 1.

    Args:
        block: The block.
        leaves: The parameters.
        dtype: Of the average; by default that of the parameters, at least float32.
    """
    average = initial_average(block, leaves, dtype)
    return BlockState(average, *by_group(block, lambda one: damped_inverse(block.structure, one, 1.0))(average))


def initial_average(block: Block, leaves: list[Tensor] | dict[int, Tensor], dtype: torch.dtype | None = None) -> Any:
    """Return the average before the first statistics."""
    layer = block.layers[0]
    like = leaves[layer.weight.index].new_empty((), dtype=dtype or dtype_of(block, leaves))
    if block.structure.joins_layers:
        whole = sum(one.groups * one.d_out * one.d_in for one in block.layers)
        return block.structure.init(1, whole, like)
    average = block.structure.init(layer.d_in, layer.d_out, like)
    if layer.groups == 1:
        return average
    return optree.tree_map(lambda x: x.expand(layer.groups, *x.shape).clone(), average)


def dtype_of(block: Block, leaves: list[Any] | dict[int, Any]) -> torch.dtype:
    """Return the dtype of averages that have that of the parameters, or of gradients: at least float32."""
    dtype = widest(*[leaves[layer.weight.index].dtype for layer in block.layers])
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def damped_inverse(structure: BlockStructure, average: Any, damping: float | Tensor) -> tuple[Any, Tensor]:
    """Return the damped inverse of an average, and the dampings in it."""
    damping = floating(damping, floating_dtype(average))  # scalars of two dtypes would make the wider one of vectors
    with profiled("inverse"):
        return structure.damped_inverse(average, damping)


def mean_eigenvalue_of(block: Block, average: Any) -> Tensor:
    """Return the mean eigenvalue of an average, ``[]``, over all its groups and units."""
    return by_group(block, block.structure.mean_eigenvalue)(average).mean()


def by_group(block: Block, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, mapped over the groups of the block's layer if there are several."""
    if block.structure.joins_layers or block.layers[0].groups == 1:
        return function
    # Contiguous, whatever vmap returns: a compiled update is compiled again where a state's strides change.
    return lambda *args: optree.tree_map(lambda x: x.contiguous(), vmap(function)(*args))


def packed(candidates: Iterable[tuple[Any, int, int]]) -> list[list[int]]:
    """Return numbers of candidates that go together, in the order of the first of each list.

    Args:
        candidates: For each a key that all in one stack share (``None`` for one that stays alone), its size, and how
            large a stack with it may be.
    """
    stacks: list[tuple[Any, int, list[int]]] = []
    for i, (key, size, largest) in enumerate(candidates):
        for j, (other, stacked, numbers) in enumerate(stacks):
            if key is not None and key == other and stacked + size <= largest:
                stacks[j] = (other, stacked + size, [*numbers, i])
                break
        else:
            stacks.append((key, size, [i]))
    return [numbers for _, _, numbers in stacks]


def signature(state: Any) -> Any:
    """Return a hashable signature of a state: type names and shapes, in nested tuples."""
    if isinstance(state, Tensor):
        return tuple(state.shape)
    inner = tuple([signature(part) for part in state]) if isinstance(state, tuple) else ()
    return (type(state).__name__, *inner)


def signatures(blocks: tuple[Block, ...], layers: Layers) -> dict[str, Any]:
    """Return the signature of each block's average, by name."""
    leaves = [torch.empty(parameter.shape, device="meta") for parameter in layers.parameters]
    return {block.name: signature(initial_average(block, leaves)) for block in blocks}


def facts_of(blocks: tuple[Block, ...], signatures: Mapping[str, Any], **numbers: float | Tensor) -> dict[str, Any]:
    """Return numbers, and what decides how much processes sum: a difference would be an error of the network alone."""
    known = {name: x for name, x in numbers.items() if not isinstance(x, Tensor)}
    return known | {
        f"structure of {one.name!r}": f"{one.structure.description()}, averages in the form {signatures[one.name]}"
        for one in blocks
    }


def check_block_states(
    expected: Mapping[str, Any], states: Mapping[str, BlockState], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Raise unless the states are those of the expected blocks.

    Args:
        expected: The signature of each block's average, by name.
        states: Of blocks, by name.
        dtypes: The dtype of each average.

    Raises:
        ValueError: Names the layer whose state is missing, unexpected, or of another form or dtype.
    """
    remedy = "pass what init() or the last update() of this transformation returned"
    if not isinstance(states, dict) or set(states) != set(expected):
        names = sorted(states) if isinstance(states, dict) else type(states).__name__
        raise ValueError(f"state: expected averages of the layers {sorted(expected)}, got {names}; {remedy}")
    for name, wanted in expected.items():
        average = getattr(states[name], "average", None)
        got = signature(average)
        if got != wanted:
            raise ValueError(f"state: expected averages of layer {name!r} in the form {wanted}, got {got}; {remedy}")
        if (dtype := floating_dtype(average)) != dtypes[name]:
            raise ValueError(
                f"state: expected averages of layer {name!r} in {dtypes[name]}, got {dtype}; {remedy}, or give the "
                "transformation that dtype="
            )
