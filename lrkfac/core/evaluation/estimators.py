"""Estimators of the Fisher: statistics of the layers from one captured pass."""

from __future__ import annotations

from typing import Literal, get_args

from lrkfac.core.base.arguments import check_choice, check_integer
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.capture import Captured, Form
from lrkfac.core.evaluation.cotangents import exact_cotangents, sampled_cotangents
from lrkfac.core.layers.statistics import Statistics, Uses
from lrkfac.core.likelihoods.joint import Joint, Leaves

Estimator = Literal["mc", "exact", "empirical", "forward_only"]


def check_options(estimator: str, samples: int, examples: int | None) -> None:
    """Refuses what ``evaluator`` cannot do."""
    check_choice(estimator, "estimator", get_args(Estimator))
    check_integer(samples, "samples")
    if samples > 1 and estimator != "mc":
        raise ValueError(f"samples: expected 1 for the estimator {estimator!r}, which draws nothing, got {samples}")
    if examples is not None:
        check_integer(examples, "examples")


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
