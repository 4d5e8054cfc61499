"""From the uses of parameters in one forward pass to the static description of layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import optree
import torch
from torch import Tensor

from lrkfac.core.base.private_torch import version
from lrkfac.core.layers.description import Layer, Layers, Parameter
from lrkfac.core.layers.kind import Options
from lrkfac.core.layers.kinds import BIAS, CUSTOM, LINEAR, LinearOptions
from lrkfac.core.layers.tracing import label
from lrkfac.core.layers.uses import Use
from lrkfac.core.layers.views import View, apply_view

NOT_USED, NO_ENTRIES = "not used by the model", "it has no entries"
WITHOUT_DERIVATIVE = NOT_USED, NO_ENTRIES
"""Reasons why a parameter is uncovered and has no derivative."""


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
    joint: bool,
) -> Layers:
    """Return the layers that the uses make up, and the reason why each other parameter belongs to none.

    Args:
        uses: From the label of a weight, or of a view of it, to its uses.
        others: From the path of a parameter to the functions that used it in a way that no kind covers.
        parameters: All parameters.
        structure: The structure of their tree.
        joint: Whether biases are joint with their weights.

    Raises:
        ValueError: If a layer's input was changed in place after its use.
    """
    _check_inputs_unchanged(uses)
    by_path = {p.path: p for p in parameters}
    reasons = {path: f"used by {', '.join(dict.fromkeys(names))}" for path, names in others.items()}
    reasons |= {p.path: NO_ENTRIES for p in parameters if 0 in p.shape}
    groups = _groups(uses, by_path)
    for path in {group.path for group in groups}:
        reason = _obstacle([g for g in groups if g.path == path], by_path[path])
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
        # A complex output has no joint bias, whose constant input would be 1 for real parts and 0 for imaginary ones.
        joins = joint and not any(use.output.is_complex() for use in group.uses) and _joinable(group.uses)
        with_bias = bias is not None and (joins or first.call.kind.unit_wise)
        layers.append(_layer(name, group, by_path, bias if with_bias else None))
        if bias is not None and not with_bias:
            layers.append(_bias_layer(_with_view(by_path[bias[0]], bias[1]), group.uses, group.sites))
    for path in dict.fromkeys([path for path, _ in biases]):
        if path in shared and path not in reasons and _is_separable(path, uses, groups):
            pairs = [(use, site) for group in groups for use, site in zip(group.uses, group.sites, strict=True)]
            of_bias = [pair for pair in pairs if pair[0].bias == (path, ())]
            layers.append(_bias_layer(by_path[path], [use for use, _ in of_bias], [site for _, site in of_bias]))
    covered = {p.path for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    for parameter in parameters:
        if parameter.path not in covered:
            partly = "the bias of an operation whose weight is not covered, or in parts of several"
            is_bias = any(path == parameter.path for path, _ in biases)
            reasons.setdefault(parameter.path, partly if is_bias else NOT_USED)
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
    arranged = {(u.path, label(u.path, u.view), u.call.turn) for of_label in uses.values() for u in of_label}
    often = Counter(path for path, _, _ in arranged)
    for name, of_label in uses.items():
        for number, use in enumerate(of_label):
            view = (*use.view, *use.call.turn)
            shape = by_path[use.path].shape
            numbers = torch.arange(math.prod(shape), device="cpu").reshape(shape)
            entries = apply_view(view, numbers) if often[use.path] > 1 else None
            for group, other in zip(groups, places, strict=True):
                turned = group.view != view and group.uses[0].call.kind is use.call.kind
                same_label = group.sites[0][0] == name and not turned
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


def _obstacle(groups: list[_Group], parameter: Parameter) -> str | None:
    """Return the reason why the uses of one parameter make no layers, ``None`` if they do."""
    counts = torch.zeros(parameter.shape, dtype=torch.int8, device="cpu")
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
            kind, shape = use.call.kind, use.output.shape
            name = use.call.options[0].name if kind is CUSTOM else kind.name
            if not kind.unit_wise and not kind.places(use.call.input, 0, use.call.options)[1]:
                return f"used by {name} on one row, without an axis for examples"
            if use.shared:
                return f"used by {name} on what all examples share, without an axis for the batch"
            if use.placement is None and (kind.unit_wise or kind.one_hot or kind is CUSTOM or shape[:1] == (1,)):
                return f"used by {name} where it is not known which rows belong to which example"
    return None


def _count(view: View, counts: Tensor) -> None:
    """Add 1 in place to the entries that a view of the tensor shows."""
    part = apply_view(view, counts)
    if part.untyped_storage().data_ptr() == counts.untyped_storage().data_ptr():
        part.add_(1)
    else:  # such as a transposition that is reshaped: a copy
        entries = apply_view(view, torch.arange(counts.numel(), device=counts.device).reshape(counts.shape)).reshape(-1)
        counts.view(-1).index_add_(0, entries, torch.ones_like(entries, dtype=counts.dtype))


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
        entries = torch.zeros(by_path[path].shape, dtype=torch.int8, device="cpu")
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
    plain = [often[group.path] == 1 and group.uses[0].call.kind is not BIAS for group in groups]
    short = [g.path.rpartition(".")[0] if one else g.sites[0][0] for g, one in zip(groups, plain, strict=True)]
    shared = Counter([*short, *paths])
    return [s if s and shared[s] == 1 else full for s, full in zip(short, long, strict=True)]


def _with_view(parameter: Parameter, view: View) -> Parameter:
    return replace(parameter, view=view)


def _layer(name: str, group: _Group, by_path: Mapping[str, Parameter], bias: tuple[str, View] | None) -> Layer:
    parameter, call = by_path[group.path], group.uses[0].call
    rows, columns = apply_view(group.view, torch.empty(parameter.shape, device="meta")).shape
    number = call.kind.groups(call.options)
    carried = bias is not None and any(_constant(use) is not None for use in group.uses)
    return Layer(
        name=name,
        kinds=tuple(use.call.kind.name for use in group.uses),
        weight=_with_view(parameter, group.view),
        bias=None if bias is None else _with_view(by_path[bias[0]], bias[1]),
        d_in=columns + (bias is not None),
        d_out=rows // number,
        groups=number,
        options=tuple(_with_constant(use, carried) for use in group.uses),
        sites=tuple(group.sites),
        placements=tuple(use.placement for use in group.uses),
        mapped=any(use.mapped for use in group.uses),
        carried=carried,
    )


def _constant(use: Use) -> int | None:
    """Return where the constant input of a joint bias stands in the rows of a use, ``None`` where it is 1 in all."""
    return LinearOptions(*use.call.options).constant if use.call.kind is LINEAR else None


def _joinable(uses: Sequence[Use]) -> bool:
    """Return whether rows can hold the constant input of a joint bias, where that is not 1 in all of them."""
    return all(_constant(use) is None for use in uses) or all(use.call.kind is LINEAR for use in uses)


def _with_constant(use: Use, carried: bool) -> Options:
    """Return the options of a use, whose rows hold the constant input of a joint bias or do not."""
    options = tuple(use.call.options)
    if use.call.kind is not LINEAR:
        return options
    constant = _constant(use) or 0
    return tuple(LinearOptions(*options)._replace(constant=constant if carried else None))


def _is_separable(path: str, uses: Mapping[str, list[Use]], groups: list[_Group]) -> bool:
    """Return whether a bias, as a whole, is everywhere the bias of products whose weights are covered."""
    everywhere = [use.bias for of_label in uses.values() for use in of_label if use.bias and use.bias[0] == path]
    covered = [use for group in groups for use in group.uses if use.bias == (path, ())]
    return len(covered) == len(everywhere) and not any(use.call.kind.unit_wise for use in covered)


def _bias_layer(bias: Parameter, uses: Sequence[Use], sites: Sequence[tuple[str, int]]) -> Layer:
    """Return the layer of a bias, or of a part of it, from the uses of weights to which it is added."""
    return Layer(
        name=label(bias.path, bias.view),
        kinds=(BIAS.name,) * len(uses),
        weight=bias,
        bias=None,
        d_in=1,
        d_out=apply_view(bias.view, torch.empty(bias.shape, device="meta")).numel(),
        groups=1,
        options=tuple((use.call.kind.name, tuple(use.call.options)) for use in uses),
        sites=tuple(sites),
        placements=tuple(use.placement for use in uses),
        mapped=any(use.mapped for use in uses),
    )
