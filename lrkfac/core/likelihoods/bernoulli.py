"""The Bernoulli likelihood: binary targets from logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.arguments import check_target_dtype, check_target_range, check_target_shape
from lrkfac.core.base.dtypes import wide
from lrkfac.core.likelihoods.protocol import Likelihood, quotient, sum_per_example


def bernoulli() -> Likelihood:
    """Return the likelihood of numbers in [0, 1] given logits: binary cross-entropy in nats.

    Outputs and targets are ``[N, ...]``, and all axes but the first are summed over. ``H = diag(p (1 - p))``.

    Examples:
        >>> import torch
        >>> outputs, targets = torch.zeros(2, 3), torch.ones(2, 3)
        >>> round(bernoulli().loss(outputs, targets).item(), 4)  # 3 log 2
        2.0794

    Returns:
        The likelihood, for ``evaluator`` and ``joint``.

    Raises:
        ValueError: At evaluation, if targets have another shape than outputs, or one lies outside [0, 1] (where they
            are on the CPU and their values known).
        TypeError: At evaluation, if targets are neither floating-point numbers nor bools.
    """
    return Likelihood(
        "bernoulli", _negative_log_likelihood, _sample, _square_root, _check, _product, residual=_residual
    )


def _negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = wide(outputs)
    return sum_per_example(F.softplus(logits) - logits * targets.to(logits.dtype))


def _sample(outputs: Tensor, noise: Tensor) -> Tensor:
    return (wide(noise) < wide(outputs).sigmoid()).to(wide(outputs).dtype)


def _square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
    return (_variances(outputs).sqrt() * coefficients).to(outputs.dtype)


def _product(outputs: Tensor, tangent: Tensor) -> Tensor:
    return (_variances(outputs) * tangent).to(outputs.dtype)


def _residual(outputs: Tensor, score: Tensor) -> Tensor:
    return quotient(wide(score), _variances(outputs).sqrt()).to(outputs.dtype)


def _variances(outputs: Tensor) -> Tensor:
    return wide(outputs).sigmoid() * (-wide(outputs)).sigmoid()


def _check(outputs: Tensor, targets: Tensor) -> None:
    if targets.dtype != torch.bool:
        check_target_dtype("bernoulli", targets)
    check_target_shape("bernoulli", targets, tuple(outputs.shape))
    if targets.dtype != torch.bool:
        check_target_range("bernoulli", targets, 0.0, 1.0)
