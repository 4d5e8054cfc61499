"""``find_layers``: a static description of the layers of a pure function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.func import vjp

from lrkfac.core.base.arguments import check_choice, check_flag, check_model, check_values
from lrkfac.core.base.by_autograd import attached, constant
from lrkfac.core.base.containers import result_leaves, with_opened_inputs
from lrkfac.core.base.private_torch import fake_mode, value_errors, version, without_checkpoints
from lrkfac.core.base.tree_checks import check_whole, paths, paths_with_none
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.dependence import Batch, find_batches
from lrkfac.core.layers.describing import describe
from lrkfac.core.layers.description import Layers, Parameter
from lrkfac.core.layers.generic import generic_parameters
from lrkfac.core.layers.jacobians import with_jacobians
from lrkfac.core.layers.module import ModuleFunction
from lrkfac.core.layers.probes import batch_size, like_fake
from lrkfac.core.layers.purity import without_random_numbers
from lrkfac.core.layers.tracing import Tracked
from lrkfac.core.layers.uses import Use, UseRecorder


def find_layers(
    model: Callable[[Tree, Tree], Any],
    params: Tree,
    inputs: Tree,
    strict: bool = False,
    bias: Literal["joint", "separate"] = "joint",
    kinds: Sequence[LayerKind] = (),
    batch_axes: Tree | None = None,
    uncovered: Literal["plain", "jacobian"] = "plain",
) -> Layers:
    """Describe the layers of a model: run it on tensors without values and watch its operations.

    A parameter is covered if every use of it is the weight (or the bias) of an operation that the
    package knows. Each other parameter is listed with the operation that used it.

    The positions of examples in a layer's rows are found by runs with values: with four and with six examples, in order
    and moved by one place, and with one of them replaced. They take the memory of one more copy of the parameters.
    If the model cannot take such batches, the positions are unknown, and structures that need gradients of single
    examples are errors.

    Examples:
        >>> import torch
        >>> from lrkfac import from_module
        >>> model, params = from_module(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()))
        >>> print(find_layers(model, params, torch.ones(5, 3, 8, 8)))
        name  kind    parameters        shape          factors    uses
        ----  ------  ----------------  -------------  ---------  ----
        0     conv2d  0.weight, 0.bias  4 x 3 x 3 x 3  A 28, B 4  1
        <BLANKLINE>
        every parameter is covered

    Args:
        model: A pure function ``model(params, inputs)`` that returns outputs (a tensor or a tree of tensors), or
            outputs and more.
        params: Tree of parameters: floating-point tensors.
        inputs: The model's inputs for a batch of any size, which is not part of the description.
        strict: Whether a parameter that no layer covers is an error.
        bias: ``"joint"`` treats a bias as one more column of the weight, with the constant input 1;
            ``"separate"`` makes it another layer.
        kinds: Custom layer kinds; they come before the package's.
        batch_axes: Which axis of the inputs holds the examples, as ``in_dims`` of ``vmap``: an integer, or a tree of
            integers and ``None`` (for leaves without one) that is a prefix of ``inputs``. By default it is found.
        uncovered: What becomes of a parameter that no operation covers. ``"plain"``: it gets plain gradients, or the
            ``fallback=`` of a transformation. ``"jacobian"``: it is a separate layer of the kind "jacobian", whose
            rows are the gradients of single examples, by the model mapped over them. So a model covers all parameters
            whatever it computes, derivatives of a network included; statistics then hold an entry of the parameter for
            each example and column.

    Returns:
        The description, which does not depend on the size of the batch; ``print`` shows it as a table. Where no
        parameter is covered, it is empty, with a warning.

    Raises:
        ValueError: If ``strict`` and a parameter is not covered; with ``uncovered="jacobian"``, if outputs of one
            example depend on others; if a parameter or an input is on
            the device "meta"; if the outputs depend on no parameter; if the model changes in place a parameter, an
            input, an internal tensor, or a layer's input after its use; if it draws hidden random numbers for dropout,
            depends on values in its control flow, or uses what depends on parameters under ``no_grad``.
        TypeError: If an argument has the wrong type, an object among the inputs holds tensors and is no known
            container, what the model returns does not start with a tensor, or ``params`` has other leaves than
            floating-point tensors. What the model raises passes.
    """
    check_model(model)
    check_flag(strict, "strict")
    check_choice(bias, "bias", ("joint", "separate"))
    check_choice(uncovered, "uncovered", ("plain", "jacobian"))
    model, inputs = with_opened_inputs(model, inputs)
    check_values(inputs=inputs)
    check_whole(params, optree.tree_leaves(params), "params")
    custom = _checked_kinds(kinds)
    axes = None if batch_axes is None else _checked_axes(batch_axes, inputs)
    parameters, structure = _parameters(params), optree.tree_structure(params)
    with torch.inference_mode(False), torch.enable_grad(), fake_mode(), without_checkpoints():
        # Copies of leaves that require a gradient show what depends on parameters, and may be changed in place.
        leaves = [like_fake(leaf).requires_grad_().clone() for leaf in optree.tree_leaves(params)]
        fake_inputs = like_fake(inputs)
        recorder = UseRecorder([(p.path, (), leaf) for p, leaf in zip(parameters, leaves, strict=True)], custom)
        with without_random_numbers(), recorder:
            result = _run(model, optree.tree_unflatten(structure, leaves), fake_inputs)
        _check_attached(result)
        _check_unchanged("params", [p.path for p in parameters], leaves)
        _check_unchanged("inputs", paths(fake_inputs), optree.tree_leaves(fake_inputs))
        recorder.separate_reused_products()
        batch_size(result)
        recorder.note_unseen(result)
        autograd = recorder.differentiates or _needs_autograd(model, params, inputs)
    with torch.inference_mode(False), torch.enable_grad(), without_checkpoints():
        leading = [x.shape[0] for x in result_leaves(result) if isinstance(x, Tensor) and x.ndim]
        batch = _batch(model, params, inputs, recorder, axes, autograd, leading)
    layers = replace(
        describe(_with_batch(recorder.uses, batch), recorder.others, parameters, structure, bias == "joint"),
        custom=custom,
        batch_axes=None if batch.axes is None else tuple(batch.axes.items()),
        independent=batch.independent,
        single=batch.single,
        own=batch.own,
        autograd=autograd,
    )
    if uncovered == "jacobian":
        with torch.inference_mode(False), torch.enable_grad(), without_checkpoints():
            layers = with_jacobians(layers, model, params, inputs)
    if strict and not layers.layers:
        raise ValueError(f"no layer found; none of the parameters is covered:\n{layers}")
    if not layers.layers:
        warnings.warn(
            "find_layers: no layer found, so that all parameters get plain gradients; print the layers for the reasons "
            '(with uncovered="jacobian" each parameter is a layer of its own)',
            stacklevel=2,
        )
    if strict and layers.uncovered:
        reasons = "; ".join(f"{p.path!r}: {reason}" for p, reason in layers.uncovered)
        raise ValueError(f"strict=True and these parameters are not covered: {reasons}")
    return layers


def _batch(
    model: Callable[[Tree, Tree], Any],
    params: Tree,
    inputs: Tree,
    recorder: UseRecorder,
    axes: Mapping[str, int] | None,
    autograd: bool,
    lengths: Sequence[int],
) -> Batch:
    """Return where the examples are, from runs of a few of them with parameters in general position."""
    parameters = generic_parameters(params)

    def run(
        some: Tree, probes: Mapping[tuple[str, int], Tensor] = MappingProxyType({})
    ) -> tuple[Any, dict[str, list[Use]]]:
        leaves, structure = optree.tree_flatten(attached(parameters) if autograd else parameters)
        leaves = [leaf.view_as(leaf) for leaf in leaves]
        tracked: Tracked = [(path, (), leaf) for path, leaf in zip(paths(params), leaves, strict=True)]
        watching = UseRecorder(tracked, recorder.custom, guarded=False, probes=probes)
        with watching:
            result = model(optree.tree_unflatten(structure, leaves), constant(some))
        watching.separate_reused_products()
        return result, watching.uses

    inner = model
    while not isinstance(inner, ModuleFunction) and hasattr(inner, "model"):
        inner = inner.model
    buffers = inner.constant_paths(inputs) if isinstance(inner, ModuleFunction) else ()
    tensors = [x for x in optree.tree_leaves((params, inputs)) if isinstance(x, Tensor)]
    with torch.random.fork_rng({x.device for x in tensors if x.device.type == "cuda"}):
        return find_batches(run, inputs, recorder.uses, axes, buffers, lengths)


def _with_batch(uses: dict[str, list[Use]], batch: Batch) -> dict[str, list[Use]]:
    """Return the uses with the places of their examples."""
    placed = {}
    for name, group in uses.items():
        places = batch.places.get(name, [(None, False)] * len(group))
        placed[name] = [u._replace(placement=p, shared=s) for u, (p, s) in zip(group, places, strict=True)]
    return placed


def _needs_autograd(model: Callable[[Tree, Tree], Any], params: Tree, inputs: Tree) -> bool:
    """Return whether ``torch.func`` refuses to differentiate the model, which runs otherwise."""
    fake_inputs = like_fake(inputs)

    def tensors(params: Tree) -> list[Tensor]:
        leaves = result_leaves(model(params, fake_inputs))
        return [x for x in leaves if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]

    try:
        vjp(tensors, like_fake(params))
    except RuntimeError:
        return True
    return False


def _checked_kinds(kinds: Any) -> tuple[LayerKind, ...]:
    if not isinstance(kinds, Sequence) or not all(isinstance(kind, LayerKind) for kind in kinds):
        raise TypeError(f"kinds: expected a tuple of LayerKind, got {kinds!r}")
    return tuple(kinds)


def _checked_axes(batch_axes: Any, inputs: Tree) -> dict[str, int]:
    """Return the axis of each leaf that has one, by path, from a tree prefix of the inputs."""
    try:
        axes = optree.broadcast_prefix(batch_axes, inputs, none_is_leaf=True)
    except ValueError as error:
        raise ValueError(
            f"batch_axes: expected an axis, None, or a tree of these that is a prefix of the inputs: {error}"
        ) from error
    by_path: dict[str, int] = {}
    leaves = optree.tree_leaves(inputs, none_is_leaf=True)
    lengths: dict[str, int] = {}
    for axis, leaf, path in zip(axes, leaves, paths_with_none(inputs), strict=True):
        if axis is None or not isinstance(leaf, Tensor):
            continue
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"batch_axes: expected integers and None, got {axis!r} for {path!r}")
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"batch_axes: got the axis {axis} for {path!r} of shape {tuple(leaf.shape)}")
        by_path[path] = axis % leaf.ndim
        lengths[path] = leaf.shape[axis]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"batch_axes: expected axes of the same length, got {lengths}")
    if not by_path:
        raise ValueError("batch_axes: expected an axis for one tensor of the inputs at least")
    return by_path


def _parameters(params: Tree) -> tuple[Parameter, ...]:
    parameters: list[Parameter] = []
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
        if any(path == other.path for other in parameters):
            raise ValueError(f"params: two parameters have the path {path!r}; keys must not contain dots that collide")
        parameters.append(Parameter(path, index, tuple(leaf.shape), dtype=leaf.dtype))
    return tuple(parameters)


def _check_unchanged(what: str, names: Iterable[str], tensors: list[Any]) -> None:
    for name, x in zip(names, tensors, strict=True):
        if isinstance(x, Tensor) and version(x):
            place = f" {name!r}" if name else ""
            raise ValueError(
                f"model: it changes {what}{place} in place; use the operation that returns a new tensor, or change a "
                "clone()"
            )


def _check_attached(result: Any) -> None:
    tensors = [x for x in result_leaves(result) if isinstance(x, Tensor)]
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
