"""The uses of parameters in one forward pass, and the mode that notes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.overrides import resolve_name

from lrkfac.core.base.private_torch import version
from lrkfac.core.layers.calls import Call
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.custom_calls import check_use
from lrkfac.core.layers.kinds import CUSTOM, LINEAR, SHIFT, LinearOptions
from lrkfac.core.layers.placement import Placement
from lrkfac.core.layers.tracing import Follow, label
from lrkfac.core.layers.views import View


class Use(NamedTuple):
    """One use of a weight.

    Attributes:
        call: The call of the operation.
        path: The path of the weight.
        view: The view of it that the operation received.
        bias: Path and view of the bias, if there is one.
        output: What the operation returned.
        version: How often the input had been changed in place.
        placement: Where the examples are, ``None`` where this is not known.
        shared: Whether all examples have the rows in common, without an axis for them.
    """

    call: Call
    path: str
    view: View
    bias: tuple[str, View] | None
    output: Tensor
    version: int
    placement: Placement | None = None
    shared: bool = False


class UseRecorder(Follow):
    """Notes each use of a parameter: as the weight or bias of a known operation, or in another way.

    Attributes:
        uses: From the label of a weight, or of a view of it, to its uses.
        others: From the path of a parameter to the functions that use it in another way.
        completed: Products that an addition completed with a bias: label, number of the use, the product, the addition.
        received: All tensors that functions received.
    """

    def __init__(self, tracked: Any, custom: tuple[LayerKind, ...], guarded: bool = True) -> None:
        super().__init__(tracked, guarded, custom)
        self.uses: dict[str, list[Use]] = {}
        self.others: dict[str, list[str]] = {}
        self.completed: list[tuple[str, int, Tensor, Use]] = []
        self.received: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            tensors = [x for x in optree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if not torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                raise ValueError(
                    f"model: {resolve_name(func) or func} is called under no_grad on what depends on "
                    f"{self._parameters_of(tensors)}; detach() it instead, by which forward derivatives stop, too"
                )
            self.received += tensors
        return result

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        places = [place for x in optree.tree_leaves((args, kwargs)) if (place := self.place(x)) is not None]
        if not places or not any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            return result
        if self.guarded and self.inside():
            raise ValueError(
                f"model: {places[0][0]!r} is used inside a transformation such as vmap, grad or jvp, where nothing can "
                "be captured; apply the transformation outside, or write the batch as a leading axis"
            )
        if call is not None:
            weight = self.place(call.weight)
            arguments = (*args, *kwargs.values())
            if call.kind is SHIFT and weight is not None and self._completes(arguments, call, weight, result):
                return result
            bias = self.place(call.bias)
            if weight is not None:
                if call.kind is CUSTOM:
                    check_use(call, result)
                use = Use(call, *weight, bias, result, version(call.input))
                self.uses.setdefault(label(*weight), []).append(use)
                # A parameter that is also the input has a second path, which no probe sees.
                as_input = self.place(call.input)
                covered = [place for place in (weight, bias) if place != as_input]
                places = [place for place in places if place not in covered]
        for path, _ in places:
            self.others.setdefault(path, []).append(resolve_name(func) or str(func))
        return result

    def _parameters_of(self, tensors: list[Tensor]) -> str:
        named = [place[0] for x in tensors if (place := self.place(x)) is not None]
        return f"the parameter {named[0]!r}" if named else "parameters"

    def _completes(self, args: Any, call: Call, place: tuple[str, View], result: Tensor) -> bool:
        """Return whether this addition is the bias of a product, as in ``x @ w + b``; if so, note it there."""
        for name, uses in self.uses.items():
            for i, use in enumerate(uses):
                plain = use.call.kind is LINEAR and use.call.options == LinearOptions() and use.call.bias is None
                if plain and use.bias is None and any(use.output is x for x in args):
                    if tuple(call.weight.shape) == tuple(use.output.shape[-1:]) and result.shape == use.output.shape:
                        shift = Use(call, *place, None, result, version(call.input))
                        self.completed.append((name, i, use.output, shift))
                        uses[i] = use._replace(bias=place, output=result)
                        return True
        return False

    def separate_reused_products(self) -> None:
        """Make two layers of a product and its bias if the product is used alone, too: its gradient is then another."""
        for name, i, product, shift in self.completed:
            if sum(x is product for x in self.received) > 1:
                self.uses[name][i] = self.uses[name][i]._replace(bias=None, output=product)
                self.uses.setdefault(label(shift.path, shift.view), []).append(shift)
