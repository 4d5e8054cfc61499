"""From the uses of parameters in one forward pass to the static description of layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import optree
import torch
from torch import Tensor

from lrkfac.core.base.private_torch import version
from lrkfac.core.layers.calls import Call
from lrkfac.core.layers.description import Layer, Layers, Parameter
from lrkfac.core.layers.kinds import BIAS, CUSTOM, LINEAR, Kind
from lrkfac.core.layers.tracing import label
from lrkfac.core.layers.uses import Use
from lrkfac.core.layers.views import View, apply_view


@dataclass
class _Group:
    """The uses of one part of a parameter, in one arrangement; it becomes one layer."""

    path: str
    view: View
    uses: list[Use]
    sites: list[tuple[str, int]]


def describe(
    uses: Mapping[str, list[Use]],
    others: Mapping[str, list[str]],
    parameters: tuple[Parameter, ...],
    structure: optree.PyTreeSpec,
    examples: int,
    joint: bool,
) -> Layers:
    """Return the layers that the uses make up, and the reason why each other parameter belongs to none.

    Args:
        uses: From the label of a weight, or of a view of it, to its uses.
        others: From the path of a parameter to the functions that used it in a way that no kind covers.
        parameters: All parameters.
        structure: The structure of their tree.
        examples: The size of the batch that was seen.
        joint: Whether biases are joint with their weights.

    Raises:
        ValueError: If a layer's input was changed in place after its use.
    """
    _check_inputs_unchanged(uses)
    by_path = {p.path: p for p in parameters}
    reasons = {path: f"used by {', '.join(dict.fromkeys(names))}" for path, names in others.items()}
    groups = _groups(uses, by_path)
    for path in {group.path for group in groups}:
        reason = _obstacle([g for g in groups if g.path == path], by_path[path], examples)
        if reason is not None:
            reasons.setdefault(path, reason)
    biases = _biases(uses)
    for path in {group.path for group in groups} & {bias[0] for bias in biases}:
        reasons.setdefault(path, "used as a bias and in another way")
    shared = _shared_biases(groups, biases, reasons, by_path)
    groups = [group for group in groups if group.path not in reasons]
    names = _names(groups, by_path)
    layers: list[Layer] = []
    for name, group in zip(names, groups, strict=True):
        first = group.uses[0]
        bias = None if first.bias is None or first.bias[0] in shared else first.bias
        with_bias = bias is not None and (joint or first.call.kind.unit_wise)
        layers.append(_layer(name, group, by_path, bias if with_bias else None))
        if bias is not None and not with_bias:
            layers.append(_bias_layer(group, by_path, bias, layers[-1]))
    covered = {p.path for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    for parameter in parameters:
        if parameter.path not in covered:
            partly = "the bias of an operation whose weight is not covered, of several weights, or not at every use"
            is_bias = any(path == parameter.path for path, _ in biases)
            reasons.setdefault(parameter.path, partly if is_bias else "not used by the model")
    uncovered = tuple((p, reasons[p.path]) for p in parameters if p.path not in covered)
    return Layers(tuple(layers), uncovered, parameters, optree.tree_unflatten(structure, parameters))


def _check_inputs_unchanged(uses: Mapping[str, list[Use]]) -> None:
    for name, group in uses.items():
        if any(version(use.call.input) != use.version for use in group):
            raise ValueError(
                f"layer {name!r}: its input is changed in place after the layer has used it; use the operation that "
                "returns a new tensor"
            )


def _groups(uses: Mapping[str, list[Use]], by_path: Mapping[str, Parameter]) -> list[_Group]:
    """Return uses grouped by the entries that they see: two views may arrange the same entries alike."""
    groups: list[_Group] = []
    places: list[Tensor | None] = []
    often = Counter(of_label[0].path for of_label in uses.values())
    for name, of_label in uses.items():
        for number, use in enumerate(of_label):
            view = (*use.view, *use.call.turn)
            shape = by_path[use.path].shape
            entries = apply_view(view, torch.arange(math.prod(shape)).reshape(shape)) if often[use.path] > 1 else None
            for group, other in zip(groups, places, strict=True):
                same_label = group.sites[0][0] == name
                if group.path == use.path and (
                    same_label or (entries is not None and other is not None and torch.equal(entries, other))
                ):
                    group.uses.append(use)
                    group.sites.append((name, number))
                    break
            else:
                groups.append(_Group(use.path, view, [use], [(name, number)]))
                places.append(entries)
    return groups


def _obstacle(groups: list[_Group], parameter: Parameter, examples: int) -> str | None:
    """Return the reason why the uses of one parameter make no layers, ``None`` if they do."""
    counts = torch.zeros(parameter.shape, dtype=torch.int8)
    if len(groups) > 1 or groups[0].view:
        for group in groups:
            _count(group.view[: len(group.uses[0].view)], counts)
        if not bool((counts == 1).all()):
            return "used in parts that overlap, leave something out or are arranged differently"
    for group in groups:
        kinds = {use.call.kind.name: use.call.kind for use in group.uses}
        if any(kind.unit_wise for kind in kinds.values()) and len(kinds) > 1:
            return f"used in different ways: {' and '.join(kinds)}"
        if len({use.call.kind.groups(use.call.options) for use in group.uses}) > 1:
            return f"used by {' and '.join(kinds)} with different numbers of groups"
        for use in group.uses:
            if use.call.kind.unit_wise:
                shape, aligned = tuple(use.output.shape), use.call.options[0]
                over_batch = len(aligned) == len(shape) and aligned[0] != 1
                if not shape or shape[0] not in (1, examples) or over_batch:
                    return f"used by {use.call.kind.name} on a tensor of shape {shape} without the batch in front"
            if use.call.kind is CUSTOM and use.call.input.shape[:1] not in ((1,), (examples,)):
                return f"used by {use.call.options[0].name} on an input without the batch in front"
            if not use.of_examples and not use.call.kind.one_hot:
                return f"used by {use.call.kind.name} on what all examples share, without an axis for the batch"
            if not use.batched and (use.call.kind.unit_wise or use.call.kind.one_hot):
                return f"used by {use.call.kind.name} where the batch is not the leading axis"
    return None


def _count(view: View, counts: Tensor) -> None:
    """Add 1 in place to the entries that a view of the tensor shows."""
    part = apply_view(view, counts)
    if part.untyped_storage().data_ptr() == counts.untyped_storage().data_ptr():
        part.add_(1)
    else:  # such as a transposition that is reshaped: a copy
        entries = apply_view(view, torch.arange(counts.numel()).reshape(counts.shape)).reshape(-1)
        counts.view(-1).index_add_(0, entries, torch.ones(len(entries), dtype=counts.dtype))


def is_batched(call: Call, output: Tensor, twice: Call, output_twice: Tensor) -> bool:
    """Return whether the leading axes of input and output grow with the batch, or stand for all examples at once."""
    pairs = [(_leading(output, call, 2), _leading(output_twice, call, 2))]
    if call.input.ndim:
        pairs.append((_leading(call.input, call, 0), _leading(twice.input, call, 0)))
    return all(after == 2 * before or after == before == 1 for before, after in pairs)


def is_of_examples(output: Tensor, output_twice: Tensor) -> bool:
    """Return whether an output grows with the batch, or has an axis of length 1 in its place."""
    return output_twice.numel() > output.numel() or (output.ndim > 1 and output.shape[0] == 1)


def _leading(x: Tensor, call: Call, side: int) -> int:
    """Return the size of the first axis of rows of the input (side 0) or output (side 2) of a product."""
    permutation = call.options[side] if call.kind is LINEAR else ()
    whole = len(permutation) == x.ndim  # inside vmap, the mapped axes are in front of those that are permuted
    return x.shape[permutation[0] if permutation and whole else 0] if x.ndim else 1


def _biases(uses: Mapping[str, list[Use]]) -> list[tuple[str, View]]:
    """Return the biases of all uses, each once."""
    biases: list[tuple[str, View]] = []
    for use in (use for of_label in uses.values() for use in of_label):
        if use.bias is not None and use.bias not in biases:
            biases.append(use.bias)
    return biases


def _shared_biases(
    groups: list[_Group], biases: list[tuple[str, View]], reasons: Mapping[str, str], by_path: Mapping[str, Parameter]
) -> set[str]:
    """Return the biases that are not, part by part, at every use of one covered weight and nowhere else."""
    shared = set()
    for path, view in biases:
        users = [group for group in groups if any(use.bias == (path, view) for use in group.uses)]
        at_every_use = all(use.bias == (path, view) for use in users[0].uses)
        if path in reasons or len(users) > 1 or users[0].path in reasons or not at_every_use:
            shared.add(path)
        entries = torch.zeros(by_path[path].shape, dtype=torch.int8)
        for other, part in biases:
            if other == path:
                apply_view(part, entries).add_(1)
        if bool((entries > 1).any()):
            shared.add(path)
    return shared


def _names(groups: list[_Group], paths: Collection[str]) -> list[str]:
    """Return names: the path without its last part unless that is empty or shared; with the view for a part."""
    often = Counter(group.path for group in groups)
    long = [group.sites[0][0] if often[group.path] > 1 else group.path for group in groups]
    short = [group.path.rpartition(".")[0] if often[group.path] == 1 else group.sites[0][0] for group in groups]
    shared = Counter([*short, *paths])
    return [s if s and shared[s] == 1 else full for s, full in zip(short, long, strict=True)]


def _with_view(parameter: Parameter, view: View) -> Parameter:
    return replace(parameter, view=view)


def _layer(name: str, group: _Group, by_path: Mapping[str, Parameter], bias: tuple[str, View] | None) -> Layer:
    parameter, call = by_path[group.path], group.uses[0].call
    rows, columns = apply_view(group.view, torch.empty(parameter.shape, device="meta")).shape
    number = call.kind.groups(call.options)
    return Layer(
        name=name,
        kinds=tuple(use.call.kind.name for use in group.uses),
        weight=_with_view(parameter, group.view),
        bias=None if bias is None else _with_view(by_path[bias[0]], bias[1]),
        d_in=columns + (bias is not None),
        d_out=rows // number,
        groups=number,
        options=tuple(tuple(use.call.options) for use in group.uses),
        sites=tuple(group.sites),
        batched=all(use.batched for use in group.uses),
        mapped=any(use.mapped for use in group.uses),
    )


def _bias_layer(group: _Group, by_path: Mapping[str, Parameter], bias: tuple[str, View], weight: Layer) -> Layer:
    kinds: list[Kind] = [use.call.kind for use in group.uses]
    options = tuple((kind.name, tuple(use.call.options)) for kind, use in zip(kinds, group.uses, strict=True))
    return Layer(
        name=label(*bias),
        kinds=(BIAS.name,) * len(kinds),
        weight=_with_view(by_path[bias[0]], bias[1]),
        bias=None,
        d_in=1,
        d_out=weight.d_out * weight.groups,
        groups=1,
        options=options,
        sites=weight.sites,
        batched=weight.batched,
        mapped=weight.mapped,
    )
