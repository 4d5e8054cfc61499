"""Capture: follow parameters through a pure function and record what passes through its layers.

A ``TorchFunctionMode`` sees every call of a known operation and knows a weight, or a view of one, by identity.
It records the operation's input and adds a *probe* to its output: a broadcast zero whose derivative is the gradient at
the output. So the statistics of all layers are the ``vjp`` of one pure function ``(parameters, probes) -> outputs``,
without hooks and whatever the model does after the operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrkfac.core.base.leaves import tree_flatten, tree_unflatten
from lrkfac.core.base.private_torch import (
    is_transformed,
    transformation_level,
    transformations,
    with_mapped_axes,
    without_checkpoints,
    without_mapped_axes,
)
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.attention import multi_head_attention
from lrkfac.core.layers.calls import Call
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.custom_calls import custom_call
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.parsers import PARSERS
from lrkfac.core.layers.purity import check_pure
from lrkfac.core.layers.views import View, picks_by_tensor, steps_of, view_name

Tracked = list[tuple[str, View, Tensor]]
"""The tensors that are followed: ``(path of the parameter, view, tensor)``."""


class Recorded(NamedTuple):
    """The input of one use of a weight, and its output before the probe."""

    input: Tensor
    output: Tensor


class Follow(TorchFunctionMode):
    """Follows parameters through their views and passes each call to ``used``.

    ``tracked`` grows as views are taken. It is passed in from outside, as are the records of ``Capture``: the
    compiler follows changes of such a list or dictionary, but not of an attribute of the mode.

    Args:
        tracked: All parameters with their paths.
        guarded: Whether to refuse impure calls; only where parameters and inputs are fake tensors.
        custom: Custom layer kinds.
    """

    def __init__(self, tracked: Tracked, guarded: bool = False, custom: tuple[LayerKind, ...] = ()) -> None:
        super().__init__()
        self.tracked, self.guarded, self.custom = tracked, guarded, custom
        self.level = transformation_level() if guarded else None
        # Identities, which the compiler does not know: a scan for each call would be quadratic in depth.
        self.numbers = {} if torch.compiler.is_compiling() else {id(x): i for i, (_, _, x) in enumerate(tracked)}

    def around(self) -> list[tuple[str, int]]:
        """Return kind and level of the transformations that the model applies around the call."""
        return [(kind, level) for kind, level in transformations() if self.level is None or level > self.level]

    def inside(self) -> bool:
        """Return whether the call stands inside a transformation that the model applies."""
        return transformation_level() != self.level

    def place(self, x: Any) -> tuple[str, View] | None:
        """Return path and view of a tensor that is followed, ``None`` for others."""
        if not torch.compiler.is_compiling():
            number = self.numbers.get(id(x))
            return None if number is None else self.tracked[number][:2]
        for path, view, tensor in self.tracked:
            if tensor is x:
                return path, view
        return None

    def follow(self, path: str, view: View, x: Tensor) -> None:
        """Follow a view of a parameter; one that is the tensor itself has a place already."""
        if not torch.compiler.is_compiling():
            self.numbers.setdefault(id(x), len(self.tracked))
        self.tracked.append((path, view, x))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.guarded and not self.inside():
            check_pure(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            if self.guarded:
                func(*args, **kwargs)  # for its checks of arguments
            with self:
                return multi_head_attention(*args, **kwargs)
        result = func(*args, **kwargs)
        name = view_name(func)
        if name is not None and not picks_by_tensor(args, kwargs):
            place = self.place(args[0]) if args else None
            if place is not None:
                for step, part in steps_of(name, args, kwargs, result):
                    self.follow(place[0], (*place[1], step), part)
            return result
        call = custom_call(self.custom, func, self.known, args, kwargs)
        if call is None:
            parser = PARSERS.get(func)
            call = None if parser is None else parser(self.known, *args, **kwargs)
        return self.used(func, args, kwargs, call, result)

    def known(self, x: Any) -> bool:
        """Return whether an argument is a parameter with entries, or a view of one."""
        return self.place(x) is not None and x.numel() > 0

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        """Return the result of a function that has run, changed or not."""
        return result


class Capture(Follow):
    """Records the uses of some weights in ``records`` and adds ``probes`` to the outputs.

    Args:
        tracked: All parameters with their paths.
        sources: The labels of the weights to watch, see ``label``.
        records: Filled with the uses of each source, in order.
        probes: For each source, one probe per use; none at all to record only.
        guarded: See ``Follow``.
        custom: See ``Follow``.
        mapped: The labels of the weights whose uses stand inside ``vmap``.
    """

    def __init__(
        self,
        tracked: Tracked,
        sources: frozenset[str],
        records: dict[str, list[Recorded]],
        probes: dict[str, list[Tensor]] | None = None,
        guarded: bool = False,
        custom: tuple[LayerKind, ...] = (),
        mapped: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(tracked, guarded, custom)
        self.sources, self.records, self.probes, self.mapped = sources, records, probes, mapped
        if mapped:
            self.level = transformation_level()

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        """Record the use of a watched weight; return the result plus its probe."""
        place = None if call is None else self.place(call.weight)
        if call is None or place is None:
            return result
        source = label(*place)
        if source not in self.sources:
            return result
        uses = self.records.setdefault(source, [])
        levels = [level for _, level in self.around()] if source in self.mapped else []
        recorded = with_batch_in_front(call.input, result, levels)
        if recorded is None:
            raise ValueError(
                f"layer {source!r}: it is used inside vmap on what does not depend on the mapped axis, other than in "
                "find_layers(): describe the layers again for these inputs"
            )
        uses.append(recorded)
        if self.probes is not None and len(uses) <= len(self.probes[source]):
            return result + without_mapped_axes(self.probes[source][len(uses) - 1], levels)
        return result


def with_batch_in_front(input: Tensor, output: Tensor, levels: Sequence[int]) -> Recorded | None:
    """Return input and output of a use inside ``vmap`` as of one without it, ``None`` unless each level maps them."""
    rows = with_mapped_axes(output, levels)
    inputs = with_mapped_axes(input, levels) if input.ndim or is_transformed(input) else input  # a shift's is 1
    return None if rows is None or inputs is None else Recorded(inputs, rows)


def label(path: str, view: View) -> str:
    """Return the name of a parameter or of a view of it, as in ``in_proj_weight.chunk(3)[0]``."""
    return path + "".join([str(step) for step in view])


def tracked_views(layers: Layers, params: Tree) -> tuple[Tree, Tracked]:
    """Return the parameters as views, so that one tensor at two places of the tree is two, and their paths beside."""
    leaves, structure = tree_flatten(params)
    views = [leaf.view_as(leaf) for leaf in leaves]
    tracked: Tracked = [(p.path, (), view) for p, view in zip(layers.parameters, views, strict=True)]
    return tree_unflatten(structure, views), tracked


def run_captured(
    model: Callable[[Tree, Tree], Any],
    layers: Layers,
    params: Tree,
    inputs: Tree,
    probes: dict[str, list[Tensor]] | None = None,
    guarded: bool = False,
) -> tuple[Any, dict[str, list[Recorded]]]:
    """Return the model's result, and the uses of each watched weight by its label.

    Raises:
        ValueError: If a weight was used more or less often than ``find_layers`` saw; inside the compiler, if it was
            used inside ``vmap``.
    """
    if layers.mapped and torch.compiler.is_compiling():
        raise ValueError(
            f"model: {sorted(layers.mapped)} are used inside vmap, where torch.compile does not see levels; write the "
            "batch as a leading axis, or evaluate outside of torch.compile"
        )
    own, tracked = tracked_views(layers, params)
    records: dict[str, list[Recorded]] = {}
    capture = Capture(tracked, layers.sources, records, probes, guarded, layers.custom, layers.mapped)
    with without_checkpoints(), capture:
        result = model(own, inputs)
    numbers = Counter(site for site, _ in {site for layer in layers for site in layer.sites})
    for layer in layers:
        for site in {site for site, _ in layer.sites}:
            expected, used = numbers[site], len(records.get(site, ()))
            if used != expected:
                hidden = "torch.compile does not show the attributes .T and .mT: write .t() or .transpose(-2, -1); or "
                raise ValueError(
                    f"layer {layer.name!r}: expected {expected} uses of {site!r}, saw {used}; "
                    f"{hidden * torch.compiler.is_compiling()}the model takes another path than in find_layers(): "
                    "describe the layers again for these inputs"
                )
    return result, records
