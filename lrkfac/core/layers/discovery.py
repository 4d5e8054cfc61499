"""``find_layers``: a static description of the layers of a pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.overrides import resolve_name

from lrkfac.core.base.arguments import check_choice, check_flag, check_model, check_values
from lrkfac.core.base.private_torch import fake_mode, value_errors, version
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.custom_calls import check_use
from lrkfac.core.layers.describing import Use, describe, is_batched, is_of_examples
from lrkfac.core.layers.description import Layers, Parameter
from lrkfac.core.layers.kinds import CUSTOM, LINEAR, SHIFT, LinearOptions
from lrkfac.core.layers.parsers import Call
from lrkfac.core.layers.probes import batch_size, like_fake
from lrkfac.core.layers.purity import without_random_numbers
from lrkfac.core.layers.tracing import Follow, label
from lrkfac.core.layers.views import View


def find_layers(
    model: Callable[[Tree, Tree], Any],
    params: Tree,
    inputs: Tree,
    strict: bool = False,
    bias: Literal["joint", "separate"] = "joint",
    kinds: Sequence[LayerKind] = (),
) -> Layers:
    """Describes the layers of a model: runs it once on tensors without values and watches its operations.

    A parameter is covered where every use of it is the weight (or the bias) of an operation that the
    package knows; each other parameter is listed with the operation that used it.

    Args:
        model: A pure function ``model(params, inputs)`` that returns outputs (a tensor or a tree of tensors), or
            outputs and more.
        params: Tree of parameters.
        inputs: The model's inputs for a batch of any size, which is not part of the description.
        strict: Whether a parameter that no layer covers is an error.
        bias: ``"joint"`` treats a bias as one more column of the weight, with the constant input 1;
            ``"separate"`` makes it a layer of its own.
        kinds: Operations of one's own that are layers, too; they come before the package's.

    Returns:
        The description; ``print`` shows it as a table.

    Raises:
        ValueError: If no layer is found, or ``strict`` and a parameter is not covered; if a parameter or an input is on
            the device "meta"; if the outputs depend on no parameter; if the model changes in place a parameter, an
            input, a tensor of its own, or a layer's input after its use; if it draws hidden random numbers for dropout,
            depends on values in its control flow, or uses what depends on parameters under ``no_grad``.
        TypeError: If an argument has the wrong type, what the model returns does not start with a tensor, or
            ``params`` has other leaves than floating-point tensors. What the model raises passes.
    """
    check_model(model)
    check_flag(strict, "strict")
    check_choice(bias, "bias", ("joint", "separate"))
    check_values(inputs=inputs)
    custom = _checked_kinds(kinds)
    parameters, structure = _parameters(params), optree.tree_structure(params)
    with torch.inference_mode(False), torch.enable_grad(), fake_mode():
        # Copies of leaves that require a gradient show what depends on parameters, and may be changed in place.
        leaves = [like_fake(leaf).requires_grad_().clone() for leaf in optree.tree_leaves(params)]
        given = like_fake(inputs)
        discovery = _Discovery([(p.path, (), leaf) for p, leaf in zip(parameters, leaves, strict=True)], custom)
        with without_random_numbers(), discovery:
            result = _run(model, optree.tree_unflatten(structure, leaves), given)
        _check_attached(result)
        _check_unchanged("params", [p.path for p in parameters], leaves)
        _check_unchanged("inputs", paths(given), optree.tree_leaves(given))
        discovery.separate_reused_products()
        twice, examples_twice = _uses_of_twice_the_batch(model, params, inputs, parameters, custom)
    examples = batch_size(result)
    grows = examples_twice > examples
    uses = {name: _with_batch(name, seen, twice, grows) for name, seen in discovery.uses.items()}
    layers = replace(describe(uses, discovery.others, parameters, structure, examples, bias == "joint"), custom=custom)
    if not layers.layers:
        raise ValueError(f"no layer found; none of the parameters is covered:\n{layers}")
    if strict and layers.uncovered:
        reasons = "; ".join(f"{p.path!r}: {reason}" for p, reason in layers.uncovered)
        raise ValueError(f"strict=True and these parameters are not covered: {reasons}")
    return layers


def _uses_of_twice_the_batch(
    model: Callable[[Tree, Tree], Any],
    params: Tree,
    inputs: Tree,
    parameters: tuple[Parameter, ...],
    custom: tuple[LayerKind, ...],
) -> tuple[dict[str, list[Use]], int]:
    """The uses with every input twice as long, to see which axes follow, and the number of examples; none where the
    model cannot do that.
    """
    leaves = [like_fake(leaf) for leaf in optree.tree_leaves(params)]
    longer = optree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x, like_fake(inputs))
    discovery = _Discovery([(p.path, (), leaf) for p, leaf in zip(parameters, leaves, strict=True)], custom)
    try:
        with discovery:
            result = model(optree.tree_unflatten(optree.tree_structure(params), leaves), longer)
    except Exception:
        return {}, 0  # such as buffers among the inputs, which must not grow
    discovery.separate_reused_products()
    return discovery.uses, batch_size(result)


def _with_batch(name: str, seen: list[Use], twice: dict[str, list[Use]], grows: bool) -> list[Use]:
    """Notes for each use how it follows the batch; that this is its leading axis is believed where nothing is known."""
    if len(twice.get(name, ())) != len(seen):
        return seen
    return [
        use._replace(
            batched=is_batched(use.call, use.output, other.call, other.output),
            of_examples=not grows or is_of_examples(use.output, other.output),
        )
        for use, other in zip(seen, twice[name], strict=True)
    ]


def _checked_kinds(kinds: Any) -> tuple[LayerKind, ...]:
    if not isinstance(kinds, Sequence) or not all(isinstance(kind, LayerKind) for kind in kinds):
        raise TypeError(f"kinds: expected a tuple of LayerKind, got {kinds!r}")
    return tuple(kinds)


def _parameters(params: Tree) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    if params is None:
        raise TypeError("params: expected a tree of tensors, got None")
    for index, (path, leaf) in enumerate(zip(paths(params), optree.tree_leaves(params), strict=True)):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"params: expected tensors, got {type(leaf).__name__} at {path!r}")
        if not leaf.is_floating_point():
            raise TypeError(
                f"params: expected floating-point tensors, got {leaf.dtype} at {path!r}; pass what is not trained in "
                "the inputs, and hold a complex parameter as a real one, see torch.view_as_complex"
            )
        if leaf.device.type == "meta":
            raise ValueError(f"params: {path!r} is on the device 'meta' and has no values; see Module.to_empty()")
        if any(path == other.path for other in found):
            raise ValueError(f"params: two parameters have the path {path!r}; keys must not contain dots that collide")
        found.append(Parameter(path, index, tuple(leaf.shape), dtype=leaf.dtype))
    return tuple(found)


def _check_unchanged(what: str, names: Iterable[str], tensors: list[Any]) -> None:
    for name, x in zip(names, tensors, strict=True):
        if isinstance(x, Tensor) and version(x):
            place = f" {name!r}" if name else ""
            raise ValueError(
                f"model: it changes {what}{place} in place; use the operation that returns a new tensor, or change a "
                "clone()"
            )


def _check_attached(result: Any) -> None:
    tensors = [x for x in optree.tree_leaves(result) if isinstance(x, Tensor)]
    if tensors and not any(x.requires_grad for x in tensors):
        raise ValueError(
            "model: its outputs depend on no parameter; does it detach() them, or does it use other tensors than "
            "those of params?"
        )


def _run(model: Callable[[Tree, Tree], Any], params: Tree, inputs: Tree) -> Any:
    try:
        return model(params, inputs)
    except value_errors() as error:
        raise ValueError(
            f"model: its path or shapes depend on the values of tensors ({error}); the layers of such a "
            "model cannot be described once and for all"
        ) from error


class _Discovery(Follow):
    """Notes each use of a parameter: as the weight or bias of a known operation, or by anything else."""

    def __init__(self, tracked: Any, custom: tuple[LayerKind, ...]) -> None:
        super().__init__(tracked, guarded=True, custom=custom)
        self.uses: dict[str, list[Use]] = {}
        self.others: dict[str, list[str]] = {}
        self.completed: list[tuple[str, int, Tensor, Use]] = []
        self.received: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            given = [x for x in optree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if not torch.is_grad_enabled() and any(x.requires_grad for x in given):
                raise ValueError(
                    f"model: {resolve_name(func) or func} is called under no_grad on what depends on "
                    f"{self._parameters_of(given)}; detach() it instead, by which forward derivatives stop, too"
                )
            self.received += given
        return result

    def used(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: Call | None, result: Any) -> Any:
        places = [place for x in optree.tree_leaves((args, kwargs)) if (place := self.place(x)) is not None]
        if not places or not any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            return result
        if self.inside():
            raise ValueError(
                f"model: {places[0][0]!r} is used inside a transformation such as vmap, grad or jvp, where nothing can "
                "be captured; apply the transformation outside, or write the batch as a leading axis"
            )
        if call is not None:
            weight = self.place(call.weight)
            given = (*args, *kwargs.values())
            if call.kind is SHIFT and weight is not None and self._completes(given, call, weight, result):
                return result
            bias = self.place(call.bias)
            if weight is not None:
                if call.kind is CUSTOM:
                    check_use(call, result)
                use = Use(call, *weight, bias, result, version(call.input))
                self.uses.setdefault(label(*weight), []).append(use)
                # A parameter that is also the input has a second path, which no probe sees.
                own = self.place(call.input)
                known = [place for place in (weight, bias) if place != own]
                places = [place for place in places if place not in known]
        for path, _ in places:
            self.others.setdefault(path, []).append(resolve_name(func) or str(func))
        return result

    def _parameters_of(self, tensors: list[Tensor]) -> str:
        named = [place[0] for x in tensors if (place := self.place(x)) is not None]
        return f"the parameter {named[0]!r}" if named else "parameters"

    def _completes(self, args: Any, call: Call, place: tuple[str, View], result: Tensor) -> bool:
        """Whether this addition is the bias of a product that was just made, as in ``x @ w + b``."""
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
        """A product that is used apart from its bias, too, has other gradients than the sum: two layers."""
        for name, i, product, shift in self.completed:
            if sum(x is product for x in self.received) > 1:
                self.uses[name][i] = self.uses[name][i]._replace(bias=None, output=product)
                self.uses.setdefault(label(shift.path, shift.view), []).append(shift)
