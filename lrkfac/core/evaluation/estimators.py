"""Estimators of the Fisher: statistics of the layers from one captured pass."""

from __future__ import annotations

from typing import Literal, get_args

from lrkfac.core.base.arguments import check_choice, check_integer
from lrkfac.core.base.processes import Processes
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.by_example import check_memory
from lrkfac.core.evaluation.capture import Captured, LayerRows
from lrkfac.core.evaluation.cotangents import exact_cotangents, given_cotangents, random_signs, sampled_cotangents
from lrkfac.core.layers.statistics import Statistics, Uses
from lrkfac.core.likelihoods.joint import Joint, Leaves

Estimator = Literal["mc", "exact", "empirical", "forward_only"]
"""How output gradients are chosen; see ``evaluator``."""


def check_estimator(estimator: str, samples: int) -> None:
    """Raise unless the estimator exists and can draw so many samples."""
    check_choice(estimator, "estimator", get_args(Estimator))
    check_integer(samples, "samples")
    if samples > 1 and estimator != "mc":
        raise ValueError(f"samples: expected 1 for the estimator {estimator!r}, which draws nothing, got {samples}")


def estimate(
    captured: Captured,
    rows: LayerRows,
    heads: Joint,
    targets: Leaves,
    estimator: Estimator,
    samples: int,
    noise: Tree | None,
    processes: Processes | None = None,
) -> Statistics:
    """Return the statistics of a captured pass.

    Args:
        captured: The forward pass.
        rows: Inputs of each layer, and gradients of the sum of the terms, which ``"empirical"`` alone uses.
        heads: The likelihood.
        targets: Of each head.
        estimator: See ``evaluator``.
        samples: Draws per term.
        noise: See ``evaluator``.
        processes: Those that share a joint batch, each of which draws its part.

    Raises:
        ValueError: If there is noise for an estimator that draws nothing, heads that share examples have different
            numbers of outputs, or as ``sampled_cotangents``.
    """
    layers = captured.layers
    if captured.uneven and not layers.own:
        shapes = [tuple(f.shape) for f in captured.outputs]
        raise ValueError(
            "model: expected outputs of all heads with the same batch axis in front, or heads with examples of their "
            f"own, as in the inputs of find_layers(), got shapes {shapes}"
        )
    signed = estimator == "exact" and not (layers.independent and layers.single)
    if noise is not None and estimator != "mc" and not signed:
        raise ValueError(f"noise: expected none for the estimator {estimator!r}, which draws nothing")
    scale, factors = heads.normalization(captured.outputs, targets)
    gradients: dict[str, Uses]
    residuals: Uses = ()
    if estimator == "forward_only":
        gradients = dict.fromkeys(rows, ())
    elif estimator == "empirical" and not captured.uneven:
        gradients = {name: uses for name, (_, uses) in rows.items()}
    else:
        to_probes = captured.probe_gradients
        if layers.jacobians:
            check_memory(layers, captured.outputs, samples if estimator == "mc" else heads.columns(captured.outputs))
        if estimator == "exact":
            signs = random_signs(heads, captured.outputs, noise, processes) if signed else None
            at_probes = exact_cotangents(heads, captured.outputs, targets, factors, to_probes, signs)
            if not signed and processes is None:
                residuals = heads.residuals(captured.outputs, targets, factors)
        elif estimator == "empirical":
            at_probes = given_cotangents(heads, captured.outputs, targets, factors, to_probes)
        else:
            drawn = samples, noise, processes
            at_probes = sampled_cotangents(heads, captured.outputs, targets, factors, to_probes, *drawn)
            scale = scale / samples
        gradients = {name: uses for name, (_, uses) in captured.rows(at_probes).items()}
    return Statistics({name: inputs for name, (inputs, _) in rows.items()}, gradients, scale, residuals)
