"""The curvature in the state of a transformation, as one operator on parameter trees."""

from __future__ import annotations

from collections import Counter
from typing import Any

import optree
import torch

from lrkfac.core.base.eager import has_values
from lrkfac.core.base.nested import nested
from lrkfac.core.base.static import Static
from lrkfac.core.curvature.block_trees import members, stacked_axes
from lrkfac.core.curvature.blocks import BlockState, signature
from lrkfac.core.curvature.ekfac import EigenbasisState
from lrkfac.core.curvature.exact import ExactState
from lrkfac.core.curvature.kronecker import KroneckerState
from lrkfac.core.curvature.layer_blocks import LayerBlocks
from lrkfac.core.curvature.low_rank_states import LowRankState
from lrkfac.core.layers.description import Layer, Layers, check_layers
from lrkfac.core.layers.matrix import LayerMatrix, layer_leaves
from lrkfac.core.linalg.operators import Kronecker, Operator


def from_state(state: Any, layers: Layers) -> LayerBlocks:
    """Return the running average of the Fisher matrix in the state of a transformation, as an operator on trees.

    It is the average itself, without damping. The preconditioner may stand anywhere within the state: that of
    ``precondition_by_fisher``, ``orthogonalize_by_fisher``, a chain, or an adaptive one. Where processes divide the
    layers (``owners``), the blocks of this process.

    Args:
        state: Of the transformation; of a ``LowRankKFAC``, its ``chain_state``.
        layers: From ``find_layers``, those of the transformation.

    Returns:
        An operator in the unit of the square of the gradient, one block for each layer. Parameters without a block are
        listed in its ``uncovered``.

    Raises:
        ValueError: If no preconditioner is in the state, one of other layers, two of one layer, or one before its first
            statistics (where they are on the CPU and their numbers known); if parts of a parameter are in two layers.
        TypeError: If ``layers`` is something else; if a custom factor structure has a state without ``operator()``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), lrkfac.low_rank_kfac(layers, 0.1)
        >>> evaluation = evaluate(params, x, y)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> fisher = lrkfac.curvature.from_state(state, layers)
        >>> natural_gradient = fisher.inverse(damping=0.1, exact=True).product(evaluation.grads)
    """
    check_layers(layers)
    names = [layer.name for layer in layers]
    averages: dict[str, Any] = {}
    for name, block in _block_states(state):
        if name in averages:
            raise ValueError(f"state: layer {name!r} has two preconditioners in it; pass the state of one of them")
        if name and name not in names:
            raise ValueError(f"state: expected one of the layers {names}, got one with {name!r}; pass its layers")
        averages[name] = block.average
    if not averages:
        raise ValueError(
            "state: expected the state of precondition_by_fisher(layers), or of a chain with it, got "
            f"{type(state).__name__} without one; of a LowRankKFAC, pass its chain_state"
        )
    return operator_of(averages, layers)


def operator_of(averages: dict[str, Any], layers: Layers) -> LayerBlocks:
    """Return the averages of blocks as one operator; raises as ``from_state``."""
    blocks = {}
    for name, average in averages.items():
        inside = members(layers, name)
        blocks[name] = _operator(name, inside, average)
    _check_apart(blocks, layers)
    return LayerBlocks(blocks, Static(layers))


def _block_states(state: Any) -> list[tuple[str, BlockState]]:
    """Return the states of all blocks within a state, by name."""
    dictionaries = [one for _, one in nested(state, dict)]
    return [(name, x) for one in dictionaries for name, x in one.items() if isinstance(x, BlockState)]


def _operator(name: str, inside: tuple[Layer, ...], average: Any) -> Operator:
    """Return a block's average as an operator, whose tensors have the state's leading axes."""
    steps = average.factor_states()[0].steps
    groups = int(bool(name) and inside[0].groups > 1)
    if has_values(steps) and not steps.all():
        raise ValueError(f"state: expected one after some statistics, got one without any of layer {name!r}")
    if isinstance(average, ExactState):
        operator = _factor(name, average.block)
        if steps.ndim == groups + 1 and inside[0].d_out == 1:  # one unit is the whole block
            operator = optree.tree_map(lambda x: x.select(groups, 0), operator)
            steps = steps.select(groups, 0)
    elif isinstance(average, EigenbasisState):
        operator = average.average
    elif isinstance(average, KroneckerState):
        operator = Kronecker(*[_factor(name, one) for one in average])
    else:
        raise TypeError(f"state: layer {name!r} has an average of the unknown type {type(average).__name__}")
    if stacked_axes(name, inside, operator) != steps.ndim:
        raise ValueError(
            f"state: expected averages of layer {name!r} for one model, got the form {signature(average)}; map over "
            "the states of an ensemble: vmap(lambda s: from_state(s, layers).product(tree))(states)"
        )
    return operator


def _factor(name: str, state: Any) -> Any:
    """Return a factor's average; with its eigenvectors where few of them say all."""
    if isinstance(state, LowRankState):
        return state.eigenpairs()
    operator = getattr(state, "operator", None)
    if operator is None:
        raise TypeError(
            f"state: layer {name!r} has a factor with the state {type(state).__name__}, which has no method "
            "operator(); give that class one, which returns the average as an operator of lrkfac.linalg"
        )
    return operator()


def _check_apart(blocks: dict[str, Any], layers: Layers) -> None:
    """Raise if parts of a parameter belong to two layers: the sum of two blocks has no inverse by layer."""
    used = [layer for layer in layers if layer.name in blocks or "" in blocks]
    often = Counter(p.index for layer in used for p in (layer.weight, layer.bias) if p is not None)
    for index in [index for index, times in often.items() if times > 1]:
        total = torch.zeros(layers.parameters[index].shape, device="cpu")
        for layer in used:
            shape = (layer.groups, layer.d_out, layer.d_in)[layer.groups == 1 :]
            ones = LayerMatrix.of(torch.ones(shape, device="cpu"), layer.bias is not None)
            leaf = layer_leaves(layer, ones).get(index)
            total = total if leaf is None else total + leaf
        if bool((total > 1).any()):
            raise ValueError(
                f"layers: expected layers that share no entry of a parameter, got {layers.parameters[index].path!r} in "
                f"{[one.name for one in used if index in (one.weight.index, one.bias and one.bias.index)]}"
            )
