"""Finds the layers of a pure function and records what passes through them.

A ``TorchFunctionMode`` sees every call of a known operation and knows a weight by identity. It records
the operation's input and adds a *probe* to its output: a broadcast zero, the derivative with respect to
which is the gradient at the output. So the statistics of all layers are the ``vjp`` of one pure function
``(parameters, probes) -> outputs``, without hooks and whatever the model does after the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrkfac.core.hidden_effects import RefuseRandomNumbers, refuse_hidden_effects
from lrkfac.core.layers import KIND_OF
from lrkfac.core.types import Layers, Tree


class Recorded(NamedTuple):
    """One use of a weight: what the operation received and returned (before the probe)."""

    input: Tensor
    output: Tensor


class OutputSpec(NamedTuple):
    """What a probe must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Capture(TorchFunctionMode):
    """Records the uses of ``weights`` in ``records`` and adds ``probes`` to the outputs.

    Args:
        weights: ``(source, tensor)`` for each weight to watch.
        records: Filled with the uses of each source, in order. Passed in from outside: the compiler
            follows changes of such a dictionary, but not of an attribute of the mode.
        probes: For each source, one probe per use; none at all to record only.
        guarded: Whether to refuse hidden effects; only where parameters and inputs are fake tensors.
    """

    def __init__(
        self,
        weights: Sequence[tuple[str, Tensor]],
        records: dict[str, list[Recorded]],
        probes: dict[str, list[Tensor]] | None = None,
        guarded: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.records, self.probes, self.guarded = weights, records, probes, guarded

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.guarded and torch._C._functorch.maybe_current_level() is None:
            refuse_hidden_effects(func, args, kwargs)
        output = func(*args, **kwargs)
        kind = KIND_OF.get(func)
        if kind is None:
            return output
        call = kind.parse(*args, **kwargs)
        for source, weight in self.weights:
            if weight is call.weight:
                uses = self.records.setdefault(source, [])
                uses.append(Recorded(call.input, output))
                if self.probes is not None and len(uses) <= len(self.probes[source]):
                    output = output + self.probes[source][len(uses) - 1]
        return output


def run_captured(
    model: Callable[[Tree, Tree], Any],
    layers: Layers,
    params: Tree,
    inputs: Tree,
    probes: dict[str, list[Tensor]] | None = None,
    guarded: bool = False,
) -> tuple[Any, dict[str, list[Recorded]]]:
    """The model's result, and what passed through each layer, by the source of the layer.

    Raises:
        ValueError: If a weight was used more or less often than ``find_layers`` saw.
    """
    leaves, structure = optree.tree_flatten(params)
    # Views, so that one tensor at two places of the tree is two parameters.
    leaves = [leaf.view_as(leaf) for leaf in leaves]
    records: dict[str, list[Recorded]] = {}
    with Capture([(s.path, leaves[s.index]) for s in layers.sources], records, probes, guarded):
        result = model(optree.tree_unflatten(structure, leaves), inputs)
    for layer in layers:
        used = len(records.get(layer.source, ()))
        if used != layer.uses:
            raise ValueError(
                f"layer {layer.name!r}: expected {layer.uses} uses of {layer.source!r}, saw {used}; the model "
                "takes another path than in find_layers(): describe the layers again for these inputs"
            )
    return result, records


def output_specs(
    model: Callable[[Tree, Tree], Any], layers: Layers, params: Tree, inputs: Tree
) -> dict[str, list[OutputSpec]]:
    """Shape, dtype and device of every layer's output, by one forward pass without computation.

    In eager mode the pass sees fake tensors; under the compiler the true ones, whose computation is then
    removed as dead code.
    """
    if torch.compiler.is_compiling():
        records = run_captured(model, layers, params, inputs)[1]
    else:
        with fake_mode(), RefuseRandomNumbers():
            records = run_captured(model, layers, like_fake(params), like_fake(inputs), guarded=True)[1]
    return {
        source: [OutputSpec(tuple(r.output.shape), r.output.dtype, r.output.device) for r in uses]
        for source, uses in records.items()
    }


def zero_probes(specs: dict[str, list[OutputSpec]]) -> dict[str, list[Tensor]]:
    """Probes that take no memory."""
    return {
        source: [torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in uses]
        for source, uses in specs.items()
    }


def fake_mode() -> Any:
    """A mode in which tensors have shapes but no values; the model's own constants may take part."""
    # Not at the top: the import takes as long as the rest of the package.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def like_fake(tree: Tree) -> Tree:
    """Tensors without values, of the same shapes, dtypes and devices; to be called in ``fake_mode``."""
    return optree.tree_map(
        lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x, tree
    )
