"""The Poisson likelihood: counts from log-rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_target_range, check_target_shape
from lrkfac.core.base.dtypes import wide
from lrkfac.core.likelihoods.protocol import Likelihood, sum_per_example


def poisson() -> Likelihood:
    """Return the likelihood of counts given logarithms of rates.

    Outputs and targets are ``[N, ...]``, and all axes but the first are summed over. The loss is ``Σ exp(s) - y s`` in
    nats without the constant ``log y!``; ``H = diag(λ)`` with ``λ = exp(s)``. Targets are drawn as ``λ ± √λ`` with even
    chances: not counts, but of the mean and variance of counts, and the first two moments of the gradient ``λ - y``
    depend on nothing else. Targets need not be whole numbers: for means of counts, or counts in another unit, this is
    the quasi-likelihood.

    Examples:
        >>> import torch
        >>> outputs, targets = torch.zeros(2, 3), torch.ones(2, 3)
        >>> poisson().loss(outputs, targets)  # 3 times exp(0) - 1 * 0
        tensor(3.)

    Returns:
        The likelihood, for ``evaluator`` and ``joint``.

    Raises:
        ValueError: At evaluation, if targets have another shape than outputs, or one is negative (where they are on
            the CPU and their values known).
        TypeError: At evaluation, if targets are bools or complex.
    """
    return Likelihood("poisson", _negative_log_likelihood, _sample, _square_root, _check, _product, residual=_residual)


def _negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    log_rates = wide(outputs)
    return sum_per_example(log_rates.exp() - log_rates * targets.to(log_rates.dtype))


def _sample(outputs: Tensor, noise: Tensor) -> Tensor:
    log_rates = wide(outputs)
    deviation = (log_rates / 2).exp()
    return log_rates.exp() + torch.where(wide(noise) < 0.5, -deviation, deviation)


def _square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
    return ((wide(outputs) / 2).exp() * coefficients).to(outputs.dtype)


def _product(outputs: Tensor, tangent: Tensor) -> Tensor:
    return (wide(outputs).exp() * tangent).to(outputs.dtype)


def _residual(outputs: Tensor, score: Tensor) -> Tensor:
    return ((-wide(outputs) / 2).exp() * score).to(outputs.dtype)


def _check(outputs: Tensor, targets: Tensor) -> None:
    if targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(f"poisson: expected targets that are counts as numbers, got {targets.dtype}")
    check_target_shape("poisson", targets, tuple(outputs.shape))
    check_target_range("poisson", targets, 0.0, math.inf)
