"""``find_layers``: a static description of the layers of a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from lrkfac.core.capture import fake_mode, like_fake
from lrkfac.core.hidden_effects import RefuseRandomNumbers, refuse_hidden_effects
from lrkfac.core.layers import BIAS, KIND_OF, KINDS, Call, Kind
from lrkfac.core.tree import paths
from lrkfac.core.types import Layer, Layers, Parameter, Tree


def find_layers(
    model: Callable[[Tree, Tree], Any],
    params: Tree,
    inputs: Tree,
    strict: bool = False,
    bias: Literal["joint", "separate"] = "joint",
) -> Layers:
    """Describes the layers of a model: runs it once on tensors without values and watches its operations.

    A parameter is covered where every use of it is the weight (or the bias) of an operation that the
    package knows; each other parameter is listed with the operation that used it.

    Args:
        model: A pure function ``model(params, inputs)`` that returns outputs, or outputs and more.
        params: Tree of parameters.
        inputs: The model's inputs for a batch of any size, which is not part of the description.
        strict: Whether a parameter that no layer covers is an error.
        bias: ``"joint"`` treats a bias as one more column of the weight, with the constant input 1;
            ``"separate"`` makes it a layer of its own.

    Returns:
        The description; ``print`` shows it as a table.

    Raises:
        ValueError: If no layer is found, or ``strict`` and a parameter is not covered; if the model changes a
            tensor of its own in place, changes a layer's input after its use, draws hidden random numbers
            for dropout or depends on values in its control flow.
        TypeError: If the model returns no tensor, or ``params`` has other leaves than tensors.
    """
    if bias not in ("joint", "separate"):
        raise ValueError(f"bias: expected 'joint' or 'separate', got {bias!r}")
    parameters, structure = _parameters(params), optree.tree_structure(params)
    watch = _Watch(parameters)
    with fake_mode():
        watch.leaves = [like_fake(leaf) for leaf in optree.tree_leaves(params)]
        with RefuseRandomNumbers(), watch:
            result = _run(model, optree.tree_unflatten(structure, watch.leaves), inputs)
    outputs = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model: expected outputs as a tensor, or a tuple that starts with one, got {type(outputs).__name__}"
        )
    layers = _describe(watch, parameters, structure, bias)
    if not layers.layers:
        raise ValueError(f"no layer found; none of the parameters is covered:\n{layers}")
    if strict and layers.uncovered:
        reasons = "; ".join(f"{p.path!r}: {reason}" for p, reason in layers.uncovered)
        raise ValueError(f"strict=True and these parameters are not covered: {reasons}")
    return layers


def _parameters(params: Tree) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    for index, (path, leaf) in enumerate(zip(paths(params), optree.tree_leaves(params), strict=True)):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"params: expected tensors, got {type(leaf).__name__} at {path!r}")
        if any(path == other.path for other in found):
            raise ValueError(f"params: two parameters have the path {path!r}; keys must not contain dots that collide")
        found.append(Parameter(path, index, tuple(leaf.shape)))
    return tuple(found)


def _run(model: Callable[[Tree, Tree], Any], params: Tree, inputs: Tree) -> Any:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        return model(params, like_fake(inputs))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"model: its path or shapes depend on the values of tensors ({error}); the layers of such a "
            "model cannot be described once and for all"
        ) from error


class _Watch(TorchFunctionMode):
    """Notes each use of a parameter: as the weight or bias of a known operation, or by anything else."""

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        super().__init__()
        self.parameters = parameters
        self.leaves: list[Tensor] = []
        self.calls: dict[int, list[tuple[Kind, Call, int | None, int]]] = {}
        self.others: dict[int, list[str]] = {}
        self.level = torch._C._functorch.maybe_current_level()

    def index(self, value: Any) -> int | None:
        return next((i for i, leaf in enumerate(self.leaves) if leaf is value), None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = torch._C._functorch.maybe_current_level() != self.level
        if not inside:
            refuse_hidden_effects(func, args, kwargs)
        result = func(*args, **kwargs)
        used = {i for x in optree.tree_leaves((args, kwargs)) if (i := self.index(x)) is not None}
        if not used or not any(isinstance(x, Tensor) for x in optree.tree_leaves(result)):
            return result
        if inside:
            path = self.parameters[used.pop()].path
            raise ValueError(
                f"model: {path!r} is used inside a transformation such as vmap, grad or jvp, where nothing can be "
                "captured; apply the transformation outside, or write the batch as a leading axis"
            )
        kind = KIND_OF.get(func)
        if kind is not None:
            call = kind.parse(*args, **kwargs)
            weight, bias = self.index(call.weight), self.index(call.bias)
            if weight is not None:
                self.calls.setdefault(weight, []).append((kind, call, bias, call.input._version))
                # A parameter that is also the input has a second path, which no probe sees.
                used -= {weight, bias} - {self.index(call.input)}
        for i in used:
            self.others.setdefault(i, []).append(resolve_name(func) or str(func))
        return result


def _describe(watch: _Watch, parameters: tuple[Parameter, ...], structure: optree.PyTreeSpec, bias: str) -> Layers:
    layers: list[Layer] = []
    reasons: dict[int, str] = {i: f"used by {', '.join(dict.fromkeys(n))}" for i, n in watch.others.items()}
    weights_of = {
        i: {w for w, calls in watch.calls.items() if any(b == i for _, _, b, _ in calls)}
        for i in range(len(parameters))
    }
    names = _names(parameters, [i for i in watch.calls if i not in reasons])
    covered: set[int] = set()
    for index, calls in watch.calls.items():
        for _, call, _, version in calls:
            if call.input._version != version:
                raise ValueError(
                    f"layer {parameters[index].path!r}: its input is changed in place after the layer has used "
                    "it; use the operation that returns a new tensor"
                )
        if index in reasons:
            continue
        kind, first, joint, _ = calls[0]
        options = tuple(tuple(call.options) for _, call, _, _ in calls)
        groups = {kind.groups(o) for o in options}
        if len(groups) > 1:
            reasons[index] = f"used by {kind.name} with different numbers of groups"
            continue
        if not first.weight.is_floating_point():
            reasons[index] = f"has the dtype {first.weight.dtype}"
            continue
        same_bias = all(b == joint for _, _, b, _ in calls)
        if joint is not None and (not same_bias or joint in reasons or weights_of[joint] != {index}):
            joint = None
        weight, layer_groups = parameters[index], groups.pop()
        rows, with_bias = weight.shape[0], joint is not None and bias == "joint"
        columns = int(torch.Size(weight.shape[1:]).numel()) + with_bias
        layers.append(
            Layer(
                name=names[index],
                kind=kind.name,
                weight=weight,
                bias=parameters[joint] if joint is not None and with_bias else None,
                d_in=columns,
                d_out=rows // layer_groups,
                groups=layer_groups,
                options=options,
                source=weight.path,
            )
        )
        covered.add(index)
        if joint is not None:
            covered.add(joint)
            if bias == "separate":
                channels = tuple((KINDS[kind.name].channel(o),) for o in options)
                path = parameters[joint].path
                layers.append(Layer(path, BIAS.name, parameters[joint], None, 1, rows, 1, channels, weight.path))
    for i in range(len(parameters)):
        if i not in covered:
            shared = "the bias of an operation whose weight is not covered, of several weights, or not at every use"
            reasons.setdefault(i, shared if weights_of[i] else "not used by the model")
    uncovered = tuple((parameters[i], reasons[i]) for i in sorted(reasons))
    return Layers(tuple(layers), uncovered, parameters, optree.tree_unflatten(structure, parameters))


def _names(parameters: tuple[Parameter, ...], indices: list[int]) -> dict[int, str]:
    """Paths without their last part, where that is neither empty nor shared with another name or path."""
    short = {i: parameters[i].path.rpartition(".")[0] for i in indices}
    often = Counter([*short.values(), *(p.path for p in parameters)])
    return {i: name if name and often[name] == 1 else parameters[i].path for i, name in short.items()}
