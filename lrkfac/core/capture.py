"""Follows parameters through a pure function and records what passes through its layers.

A ``TorchFunctionMode`` sees every call of a known operation and knows a weight, or a view of one, by identity.
It records the operation's input and adds a *probe* to its output: a broadcast zero, the derivative with
respect to which is the gradient at the output. So the statistics of all layers are the ``vjp`` of one pure
function ``(parameters, probes) -> outputs``, without hooks and whatever the model does after the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrkfac.core.attention import OPENED
from lrkfac.core.calls import PARSERS, Call
from lrkfac.core.hidden_effects import RefuseRandomNumbers, refuse_hidden_effects
from lrkfac.core.layers import EMBEDDING
from lrkfac.core.own_calls import call_of_own
from lrkfac.core.own_kinds import LayerKind
from lrkfac.core.types import Layers, Tree
from lrkfac.core.views import View, is_view, picks_by_tensor, steps_of

Tracked = list[tuple[str, View, Tensor]]
"""``(path of the parameter, view, tensor)``: what is followed."""


class Recorded(NamedTuple):
    """One use of a weight: what the operation received and returned (before the probe)."""

    input: Tensor
    output: Tensor


class OutputSpec(NamedTuple):
    """What a probe must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Follow(TorchFunctionMode):
    """Follows parameters through their views and shows each use to ``used``.

    ``tracked`` grows as views are taken. It is passed in from outside, as are the records of ``Capture``: the
    compiler follows changes of such a list or dictionary, but not of an attribute of the mode.

    Args:
        tracked: All parameters with their paths.
        guarded: Whether to refuse hidden effects; only where parameters and inputs are fake tensors.
        own: Kinds beside those that the package knows.
    """

    def __init__(self, tracked: Tracked, guarded: bool = False, own: tuple[LayerKind, ...] = ()) -> None:
        super().__init__()
        self.tracked, self.guarded, self.own = tracked, guarded, own
        self.level = torch._C._functorch.maybe_current_level() if guarded else None

    def inside(self) -> bool:
        """Whether the model is within a transformation of its own."""
        return torch._C._functorch.maybe_current_level() != self.level

    def place(self, x: Any) -> tuple[str, View] | None:
        """Path and view of a tensor that is followed."""
        for path, view, tensor in self.tracked:
            if tensor is x:
                return path, view
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.guarded and not self.inside():
            refuse_hidden_effects(func, args, kwargs)
        opened = OPENED.get(func)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        result = func(*args, **kwargs)
        name = is_view(func)
        if name is not None and not picks_by_tensor(args, kwargs):
            place = self.place(args[0]) if args else None
            if place is not None:
                for step, part in steps_of(name, args, kwargs, result):
                    self.tracked.append((place[0], (*place[1], step), part))
            return result
        call = call_of_own(self.own, func, self.known, args, kwargs)
        if call is None:
            parser = PARSERS.get(func)
            call = None if parser is None else parser(self.known, *args, **kwargs)
        return self.used(func, args, kwargs, call, result)

    def known(self, x: Any) -> bool:
        """Whether an argument is a parameter, or a view of one."""
        return self.place(x) is not None

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        """Called after a function has run; returns its result, changed or not."""
        return result


class Capture(Follow):
    """Records the uses of some weights in ``records`` and adds ``probes`` to the outputs.

    Args:
        tracked: All parameters with their paths.
        sources: The labels of the weights to watch, see ``label``.
        records: Filled with the uses of each source, in order.
        probes: For each source, one probe per use; none at all to record only.
        guarded: See ``Follow``.
        own: See ``Follow``.
    """

    def __init__(
        self,
        tracked: Tracked,
        sources: frozenset[str],
        records: dict[str, list[Recorded]],
        probes: dict[str, list[Tensor]] | None = None,
        guarded: bool = False,
        own: tuple[LayerKind, ...] = (),
    ) -> None:
        super().__init__(tracked, guarded, own)
        self.sources, self.records, self.probes = sources, records, probes

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        """Records and adds a probe."""
        place = None if call is None else self.place(call.weight)
        if call is None or place is None:
            return result
        source = label(*place)
        if source not in self.sources:
            return result
        uses = self.records.setdefault(source, [])
        uses.append(Recorded(call.input, result))
        if self.probes is not None and len(uses) <= len(self.probes[source]):
            return result + self.probes[source][len(uses) - 1]
        return result


class ConstantPadding(TorchFunctionMode):
    """Cuts the derivative of an embedding at its padding: torch's forward derivatives, unlike the others, do not."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        padding = _padding(*args, **(kwargs or {})) if func is F.embedding else None
        return result if padding is None else torch.where(padding[..., None], result.detach(), result)


def _padding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
    return None if padding_idx is None else input == padding_idx % weight.shape[0]


def with_constant_padding(layers: Layers) -> AbstractContextManager[Any]:
    """``ConstantPadding`` where a layer is an embedding with padding; else nothing."""
    uses = [use for layer in layers for use in zip(layer.kinds, layer.options, strict=True)]
    padded = any(kind == EMBEDDING.name and options[1] is not None for kind, options in uses)
    return ConstantPadding() if padded else nullcontext()


def label(path: str, view: View) -> str:
    """The name of a parameter or of a view of it, as in ``in_proj_weight.chunk(3)[0]``."""
    return path + "".join([str(step) for step in view])


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
    tracked: Tracked = [(p.path, (), leaf) for p, leaf in zip(layers.parameters, leaves, strict=True)]
    with Capture(tracked, layers.sources, records, probes, guarded, layers.own):
        result = model(optree.tree_unflatten(structure, leaves), inputs)
    for layer in layers:
        for site in {site for site, _ in layer.sites}:
            expected, used = sum(name == site for name, _ in layer.sites), len(records.get(site, ()))
            if used != expected:
                raise ValueError(
                    f"layer {layer.name!r}: expected {expected} uses of {site!r}, saw {used}; the model takes "
                    "another path than in find_layers(): describe the layers again for these inputs"
                )
    return result, records


def output_specs(
    model: Callable[[Tree, Tree], Any], layers: Layers, params: Tree, inputs: Tree
) -> dict[str, list[OutputSpec]]:
    """Shape, dtype and device of every layer's output, by one forward pass without computation.

    In eager mode the pass sees fake tensors; under the compiler the true ones, whose computation is then
    removed as dead code. What a layer returns once for all examples (positions) is repeated for each, so that
    their gradients stay apart.

    Raises:
        ValueError: If the model cannot take what is repeated.
    """
    if torch.compiler.is_compiling():
        result, records = run_captured(model, layers, params, inputs)
    else:
        with fake_mode(), RefuseRandomNumbers():
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
                found = _shapes(
                    run_captured(model, layers, like_fake(params), like_fake(inputs), zero_probes(specs))[0]
                )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(_NOT_REPEATED.format(shared)) from error
        if found != expected:
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
    """The length of the leading axis of a model's first output; of outputs alone, or of outputs and more.

    Raises:
        TypeError: If the model returns something else.
    """
    leaves = optree.tree_leaves(result)
    if not leaves or not isinstance(leaves[0], Tensor):
        kind = type(leaves[0] if leaves else result).__name__
        raise TypeError(f"model: expected outputs as a tensor or a tree that starts with one, got {kind}")
    return leaves[0].shape[0] if leaves[0].ndim else 1


def repeated(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The shape with ``n`` examples where it has one for all of them."""
    return (n, *shape[1:]) if shape and shape[0] == 1 else shape


def zero_probes(specs: dict[str, list[OutputSpec]], sources: Container[str] | None = None) -> dict[str, list[Tensor]]:
    """Probes that take no memory, of all sources or of some."""
    return {
        source: [torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in uses]
        for source, uses in specs.items()
        if sources is None or source in sources
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
