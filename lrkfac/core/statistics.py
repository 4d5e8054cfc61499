"""Statistics of the layers from one captured pass through the model, by every estimator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import optree
import torch
from torch import Tensor

from lrkfac.core.checks import has_values, need_choice, need_integer
from lrkfac.core.cotangents import exact_cotangents, sampled_cotangents
from lrkfac.core.covariances import Uses, prepared
from lrkfac.core.joint import Joint, Leaves
from lrkfac.core.types import Layers, Statistics, Tree

Estimator = Literal["mc", "exact", "empirical", "forward_only"]
Asked = bool | Tensor | Collection[str]
"""All statistics or none, of some examples by number, or of some layers by name."""

AtProbes = Mapping[str, Sequence[Tensor]]
"""Gradients at the probes of each source."""

Form = dict[str, tuple[Uses, Uses]]
"""Inputs and output gradients of each layer, in the standard form of ``lrkfac.core.layers``."""


@dataclass(frozen=True)
class Captured:
    """One forward pass through the model.

    Attributes:
        layers: Whose uses were captured.
        outputs: What came out of each head, ``[N, ...]``.
        recorded: What each source's operations received.
        probes: Those that were added, zero.
        transpose: The way back, from a cotangent of ``outputs`` to gradients of parameters and at probes.
    """

    layers: Layers
    outputs: list[Tensor]
    recorded: Mapping[str, Sequence[Tensor]]
    probes: AtProbes
    transpose: Callable[[list[Tensor]], tuple[dict[int, Tensor], AtProbes]]

    def standard_form(self, at_probes: AtProbes) -> Form:
        """Of all layers, from gradients at the probes with a leading axis ``k``."""
        return standard_form(self.layers, self.recorded, at_probes, self.outputs)

    def standard_form_of_one(self, at_probes: AtProbes) -> Form:
        """The same from gradients without that axis, ``k = 1``."""
        return self.standard_form({source: [g[None] for g in uses] for source, uses in at_probes.items()})


def standard_form(
    layers: Layers, recorded: Mapping[str, Sequence[Tensor]], at_probes: AtProbes, outputs: list[Tensor]
) -> Form:
    """What was captured of some layers, as ``lrkfac.core.layers`` takes it; gradients with a leading axis ``k``."""
    form = {}
    for layer in layers:
        inputs = tuple([recorded[source][use] for source, use in layer.sites])
        gradients = tuple([at_probes[source][use] for source, use in layer.sites])
        form[layer.name] = prepared(layer, inputs, gradients, outputs[0].shape[0])
    return form


def check_options(estimator: str, samples: int, examples: int | None) -> None:
    """Refuses what ``fisher`` cannot do."""
    need_choice(estimator, "estimator", get_args(Estimator))
    need_integer(samples, "samples")
    if samples > 1 and estimator != "mc":
        raise ValueError(f"samples: expected 1 for the estimator {estimator!r}, which draws nothing, got {samples}")
    if examples is not None:
        need_integer(examples, "examples")


def statistics_of(
    seen: Captured,
    of_loss: Form,
    heads: Joint,
    targets: Leaves,
    estimator: Estimator,
    samples: int,
    noise: Tree | None,
) -> Statistics:
    """What an estimator makes of a pass, and of the gradients of the terms' sum, which only ``"empirical"`` uses."""
    if noise is not None and estimator != "mc":
        raise ValueError(f"noise: expected none for the estimator {estimator!r}, which draws nothing")
    scale, factors = heads.normalization(seen.outputs, targets)
    if estimator == "forward_only":
        gradients: dict[str, Uses] = dict.fromkeys(of_loss, ())
    elif estimator == "empirical":
        gradients = {name: uses for name, (_, uses) in of_loss.items()}
    else:
        of_heads = (heads, seen.outputs, targets, factors, lambda cotangents: seen.transpose(cotangents)[1])
        at_probes = (
            exact_cotangents(*of_heads) if estimator == "exact" else sampled_cotangents(*of_heads, samples, noise)
        )
        gradients = {name: uses for name, (_, uses) in seen.standard_form(at_probes).items()}
    if estimator == "mc":
        scale = scale / samples
    return Statistics({name: inputs for name, (inputs, _) in of_loss.items()}, gradients, scale)


def chosen(statistics: Any, names: frozenset[str]) -> tuple[bool | Tensor, frozenset[str]]:
    """What ``evaluate`` is asked for: statistics or not, or the numbers of examples; and of which of the named layers.

    Raises:
        ValueError: If it names no layer, or does not choose examples by number.
        TypeError: If it is something else.
    """
    if isinstance(statistics, Tensor):
        if statistics.ndim != 1 or statistics.dtype not in (torch.int64, torch.int32) or not statistics.numel():
            raise ValueError(
                "statistics: expected True, False, names of layers or the numbers of some examples, int64 of shape "
                f"[n], got {statistics.dtype} of shape {tuple(statistics.shape)}"
            )
        return statistics, names
    if isinstance(statistics, bool):
        return statistics, names
    if not isinstance(statistics, tuple | list | set | frozenset) or not all(isinstance(x, str) for x in statistics):
        raise TypeError(
            "statistics: expected True, False, a tuple of names of layers or a tensor of numbers of examples, got "
            f"{statistics!r}"
        )
    unknown = sorted(set(statistics) - names)
    if unknown:
        raise ValueError(f"statistics: no layers {unknown}; expected some of {sorted(names)}")
    return len(statistics) > 0, frozenset(statistics)


def of_layers(found: Statistics, names: frozenset[str]) -> Statistics:
    """The statistics of some layers; those of the others are empty."""
    parts = [{name: uses if name in names else () for name, uses in part.items()} for part in found[:2]]
    return Statistics(parts[0], parts[1], found.scale)


def examples_of(tree: Tree, numbers: Tensor, size: int) -> Tree:
    """The examples of these numbers; what has not the batch of this size as its leading axis stays whole.

    Raises:
        ValueError: If a number is none of an example (where they are on the CPU and known).
    """
    if has_values(numbers) and not (numbers.min() >= 0 and numbers.max() < size):
        raise ValueError(f"statistics: expected numbers of examples from 0 to {size - 1}, got {numbers.tolist()}")

    def taken(x: Any) -> Any:
        return x[numbers.long()] if isinstance(x, Tensor) and x.ndim and x.shape[0] == size else x

    return optree.tree_map(taken, tree, none_is_leaf=True)


def without_others(aux: Any, rest: list[Any]) -> list[Tensor]:
    """The tensors of ``aux``, which is all that torch.func takes; ``rest`` becomes what is left of it."""
    leaves, structure = optree.tree_flatten(aux, none_is_leaf=True)
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    rest[:] = [others, structure]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def with_others(tensors: list[Tensor], rest: list[Any]) -> Any:
    """The inverse of ``without_others``."""
    others, structure = rest
    remaining = iter(tensors)
    return optree.tree_unflatten(structure, [next(remaining) if other is None else other[0] for other in others])
