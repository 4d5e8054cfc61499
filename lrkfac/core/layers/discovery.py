"""``find_layers``: a static description of the layers of a pure function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.func import vjp

from lrkfac.core.base.arguments import check_choice, check_flag, check_model, check_values
from lrkfac.core.base.private_torch import fake_mode, value_errors, version, without_checkpoints
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.describing import describe, is_batched, is_of_examples
from lrkfac.core.layers.description import Layers, Parameter
from lrkfac.core.layers.probes import batch_size, like_fake
from lrkfac.core.layers.purity import without_random_numbers
from lrkfac.core.layers.uses import Use, UseRecorder


def find_layers(
    model: Callable[[Tree, Tree], Any],
    params: Tree,
    inputs: Tree,
    strict: bool = False,
    bias: Literal["joint", "separate"] = "joint",
    kinds: Sequence[LayerKind] = (),
) -> Layers:
    """Describe the layers of a model: run it on tensors without values and watch its operations.

    A parameter is covered where every use of it is the weight (or the bias) of an operation that the
    package knows; each other parameter is listed with the operation that used it.

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

    Returns:
        The description, which does not depend on the size of the batch; ``print`` shows it as a table. Where no
        parameter is covered, it is empty, with a warning.

    Raises:
        ValueError: If ``strict`` and a parameter is not covered; if a parameter or an input is on
            the device "meta"; if the outputs depend on no parameter; if the model changes in place a parameter, an
            input, an internal tensor, or a layer's input after its use; if it draws hidden random numbers for dropout,
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
        recorder.note_unseen(result)
        twice, examples_twice = _uses_of_twice_the_batch(model, params, inputs, parameters, custom)
        autograd = recorder.differentiates or _needs_autograd(model, params, inputs)
    examples = batch_size(result)
    grows = examples_twice > examples
    uses = {
        name: _with_batch(name, group, twice, grows)
        for name, group in recorder.uses.items()
        if _is_of_batch(name, group, twice, examples, recorder.others)
    }
    layers = describe(uses, recorder.others, parameters, structure, examples, bias == "joint")
    layers = replace(layers, custom=custom, autograd=autograd)
    if strict and not layers.layers:
        raise ValueError(f"no layer found; none of the parameters is covered:\n{layers}")
    if not layers.layers:
        warnings.warn(
            "find_layers: no layer found, so that all parameters get plain gradients; print the layers for the reasons",
            stacklevel=2,
        )
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
    """Return the uses and the number of examples with every input twice as long, to see which axes follow the batch.

    There are none where the model cannot take such inputs.
    """
    leaves = [like_fake(leaf) for leaf in optree.tree_leaves(params)]
    longer = optree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x, like_fake(inputs))
    recorder = UseRecorder([(p.path, (), leaf) for p, leaf in zip(parameters, leaves, strict=True)], custom)
    try:
        with recorder:
            result = model(optree.tree_unflatten(optree.tree_structure(params), leaves), longer)
    except Exception:
        return {}, 0  # such as buffers among the inputs, which must not grow
    recorder.separate_reused_products()
    return recorder.uses, batch_size(result)


def _with_batch(name: str, uses: list[Use], twice: dict[str, list[Use]], grows: bool) -> list[Use]:
    """Return the uses with how each follows the batch; by default this is the leading axis."""
    if len(twice.get(name, ())) != len(uses):
        return uses
    return [
        use._replace(
            batched=is_batched(use.call, use.output, other.call, other.output),
            of_examples=not grows or is_of_examples(use.output, other.output),
        )
        for use, other in zip(uses, twice[name], strict=True)
    ]


def _is_of_batch(
    name: str, uses: list[Use], twice: dict[str, list[Use]], examples: int, others: dict[str, list[str]]
) -> bool:
    """Return whether uses inside ``vmap`` are seen to map over the examples; if not, list them as no layer."""
    if not any(use.mapped for use in uses):
        return True
    after = twice.get(name, [])
    if len(after) == len(uses):
        pairs = [(use.output.shape[0], other.output.shape[0]) for use, other in zip(uses, after, strict=True)]
        if all(pair == (examples, 2 * examples) for pair in pairs):
            return True
    for path in {path for use in uses for path, _ in ((use.path, ()), *([use.bias] if use.bias else []))}:
        name = f"{uses[0].call.kind.name} inside vmap over another axis than the batch"
        others.setdefault(path, []).append(name)
    return False


def _needs_autograd(model: Callable[[Tree, Tree], Any], params: Tree, inputs: Tree) -> bool:
    """Return whether ``torch.func`` refuses to differentiate the model, which runs otherwise."""
    fake_inputs = like_fake(inputs)

    def tensors(params: Tree) -> list[Tensor]:
        return [x for x in optree.tree_leaves(model(params, fake_inputs)) if isinstance(x, Tensor)]

    try:
        vjp(tensors, like_fake(params))
    except RuntimeError:
        return True
    return False


def _checked_kinds(kinds: Any) -> tuple[LayerKind, ...]:
    if not isinstance(kinds, Sequence) or not all(isinstance(kind, LayerKind) for kind in kinds):
        raise TypeError(f"kinds: expected a tuple of LayerKind, got {kinds!r}")
    return tuple(kinds)


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
