"""The uses of parameters in one forward pass, and the mode that notes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.overrides import resolve_name

from lrkfac.core.base.private_torch import (
    forward_level,
    is_inside_function,
    is_transformed,
    transformation_level,
    version,
)
from lrkfac.core.layers.calls import Call
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.custom_calls import check_use
from lrkfac.core.layers.hints import hint
from lrkfac.core.layers.kinds import CUSTOM, LINEAR, SHIFT, LinearOptions
from lrkfac.core.layers.placement import Placement
from lrkfac.core.layers.tracing import Follow, label, with_batch_in_front
from lrkfac.core.layers.views import View


class Use(NamedTuple):
    """One use of a weight.

    Attributes:
        call: The call of the operation.
        path: The path of the weight.
        view: The view of it that the operation received.
        bias: Path and view of the bias, if there is one.
        output: What the operation returned; inside ``vmap`` with the mapped axes in front, as the call's input.
        version: How often the input had been changed in place.
        placement: Where the examples are, ``None`` where this is not known.
        shared: Whether all examples have the rows in common, without an axis for them.
        result: What the operation returned, as it is.
        mapped: Whether it stands inside ``vmap``, within the model.
    """

    call: Call
    path: str
    view: View
    bias: tuple[str, View] | None
    output: Tensor
    version: int
    placement: Placement | None = None
    shared: bool = False
    result: Tensor | None = None
    mapped: bool = False


class UseRecorder(Follow):
    """Notes each use of a parameter: as the weight or bias of a known operation, or in another way.

    Attributes:
        uses: From the label of a weight, or of a view of it, to its uses.
        others: From the path of a parameter to the functions that use it in another way.
        completed: Products that an addition completed with a bias: label, number, the use before, the addition.
        received: All tensors that functions received.
        probes: Tensors to add to the outputs of uses, by label and number.
        differentiates: Whether the model calls ``torch.autograd.grad``.
    """

    def __init__(
        self,
        tracked: Any,
        custom: tuple[LayerKind, ...],
        guarded: bool = True,
        probes: Mapping[tuple[str, int], Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__(tracked, guarded, custom)
        self.probes = probes
        self.level = transformation_level()
        self.uses: dict[str, list[Use]] = {}
        self.others: dict[str, list[str]] = {}
        self.completed: list[tuple[str, int, Use, Use]] = []
        self.received: list[Tensor] = []
        self.differentiates = False
        self.forward_level = forward_level()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.autograd.grad and self.guarded:
            self._note_derivative(*args, **(kwargs or {}))
        result = super().__torch_function__(func, types, args, kwargs)
        if any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            tensors = [x for x in optree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            stopped = not torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            if stopped and not is_inside_function():
                raise ValueError(
                    f"model: {resolve_name(func) or func} is called under no_grad on what depends on "
                    f"{self._parameters_of(tensors)}; detach() it instead, by which forward derivatives stop, too, or "
                    "call eval() on a part that does so in training mode alone"
                )
            self.received += tensors
        return result

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        places = [place for x in optree.tree_leaves((args, kwargs)) if (place := self.place(x)) is not None]
        if not places or not any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            return result
        name, where = resolve_name(func) or str(func), self._where()
        weight = None if call is None else self.place(call.weight)
        if call is not None and weight is not None and not where:
            if call.kind is CUSTOM and not self.around():
                check_use(call, result)
            use = self._use(call, weight, result)
            custom, constant = " inside vmap", " inside vmap on what does not depend on the mapped axis"
            where = "" if use is not None else custom if call.kind is CUSTOM else constant
            if use is not None:
                if call.kind is SHIFT and self._completes((*args, *kwargs.values()), use):
                    return result
                of_label = self.uses.setdefault(label(*weight), [])
                of_label.append(use)
                probe = self.probes.get((label(*weight), len(of_label) - 1))
                result = result if probe is None else result + probe
                # A parameter that is also the input has a second path, which no probe sees.
                as_input = self.place(call.input)
                covered = [place for place in (weight, use.bias) if place != as_input]
                places = [place for place in places if place not in covered]
        more = hint(func, self.custom) if call is None and not where else where
        for path, _ in places:
            self.others.setdefault(path, []).append(name + more)
        return result

    def _where(self) -> str:
        """Return where a call stands that no probe can follow, empty for others."""
        if is_inside_function():
            return " inside a custom torch.autograd.Function"
        kinds = [kind for kind, _ in self.around() if kind != "vmap"]
        if kinds or forward_level() > self.forward_level:
            named = f"torch.func.{kinds[-1]}" if kinds else "torch.autograd.forward_ad"
            return f" inside a derivative that the model takes ({named})"
        return ""

    def _use(self, call: Call, place: tuple[str, View], result: Tensor) -> Use | None:
        """Return the use of a weight, ``None`` inside ``vmap`` unless it is of one row for each index."""
        around = self.around()
        if not around:
            return Use(call, *place, self.place(call.bias), result, version(call.input), result=result)
        rows = None if call.kind is CUSTOM else with_batch_in_front(call.input, result, [level for _, level in around])
        if rows is None:
            return None
        call, output = call._replace(input=rows.input), rows.output
        return Use(call, *place, self.place(call.bias), output, version(rows.input), result=result, mapped=True)

    def _note_derivative(
        self,
        outputs: Any,
        inputs: Any = None,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """List the parameters of which the outputs depend whose derivative the model takes by ``torch.autograd.grad``.

        Raises:
            ValueError: If the derivative is a constant for the gradient but not for forward derivatives.
        """
        tensors = [x for x in optree.tree_leaves(outputs) if isinstance(x, Tensor)]
        if not any(is_transformed(x) for x in tensors):  # else torch.func calls, or may refuse to differentiate
            self.differentiates = True
        attached = [x for x in tensors if x.requires_grad]
        roots = [(path, leaf) for path, view, leaf in self.tracked if not view and leaf.requires_grad]
        if not attached or not roots or any(kind != "vmap" for kind, _ in self.around()):
            return
        ones = [torch.ones_like(x) for x in attached]
        of_roots = torch.autograd.grad(attached, [x for _, x in roots], ones, retain_graph=True, allow_unused=True)
        paths = [path for (path, _), gradient in zip(roots, of_roots, strict=True) if gradient is not None]
        if paths and not create_graph:
            raise ValueError(
                f"model: torch.autograd.grad without create_graph=True on what depends on the parameter {paths[0]!r}: "
                "the result is a constant for the gradient, but not for forward derivatives; pass create_graph=True"
            )
        for path in paths:
            name = "a derivative that the model takes (torch.autograd.grad)"
            self.others.setdefault(path, []).append(name)

    def note_unseen(self, result: Any) -> None:
        """List the parameters on which the result depends though no call received them."""
        seen = {*self.others, *(use.path for uses in self.uses.values() for use in uses)}
        seen |= {use.bias[0] for uses in self.uses.values() for use in uses if use.bias is not None}
        roots = [(path, leaf) for path, view, leaf in self.tracked if not view and path not in seen]
        attached = [x for x in optree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
        if roots and attached:
            ones = [torch.ones_like(x) for x in attached]
            gradients = torch.autograd.grad(attached, [x for _, x in roots], ones, allow_unused=True)
            for (path, _), gradient in zip(roots, gradients, strict=True):
                if gradient is not None:
                    self.others[path] = ["a transformation or torch.autograd.Function that it is an argument of"]

    def _parameters_of(self, tensors: list[Tensor]) -> str:
        named = [place[0] for x in tensors if (place := self.place(x)) is not None]
        return f"the parameter {named[0]!r}" if named else "parameters"

    def _completes(self, args: Any, shift: Use) -> bool:
        """Return whether this addition is the bias of a product, as in ``x @ w + b``; if so, note it there."""
        for name, uses in self.uses.items():
            for i, use in enumerate(uses):
                plain = use.call.kind is LINEAR and use.call.options == LinearOptions() and use.call.bias is None
                if plain and use.bias is None and any(use.result is x for x in args):
                    of_row = tuple(shift.call.weight.shape) == tuple(use.output.shape[-1:])
                    if of_row and shift.output.shape == use.output.shape:
                        self.completed.append((name, i, use, shift))
                        of_values = shift.call.options[1:]  # of jets, where the bias is added to these alone
                        options = LinearOptions(constant=of_values[0]) if of_values else LinearOptions()
                        completed = use._replace(call=use.call._replace(options=options), output=shift.output)
                        uses[i] = completed._replace(bias=(shift.path, shift.view), result=shift.result)
                        return True
        return False

    def separate_reused_products(self) -> None:
        """Make two layers of a product and its bias if the product is used alone, too: its gradient is then another."""
        for name, i, product, shift in self.completed:
            if sum(x is product.result for x in self.received) > 1:
                self.uses[name][i] = self.uses[name][i]._replace(
                    call=product.call, bias=None, output=product.output, result=product.result
                )
                self.uses.setdefault(label(shift.path, shift.view), []).append(shift)
