"""The Bernoulli likelihood: binary targets from logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.arguments import check_target_dtype, check_target_range, check_target_shape
from lrkfac.core.base.dtypes import wide
from lrkfac.core.likelihoods.protocol import Likelihood, sum_per_example


def bernoulli() -> Likelihood:
    """Numbers in [0, 1] from logits: outputs and targets ``[N, ...]``, summed over all axes but the first.

    The loss is binary cross-entropy in nats; ``H = diag(p (1 - p))``.

    Raises:
        ValueError: At evaluation, if targets have another shape than outputs, or one lies outside [0, 1] (where they
            are on the CPU and their values known).
        TypeError: At evaluation, if targets are neither floating-point numbers nor bools.
    """

    def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        logits = wide(outputs)
        return sum_per_example(F.softplus(logits) - logits * targets.to(logits.dtype))

    def sample(outputs: Tensor, noise: Tensor) -> Tensor:
        return (wide(noise) < wide(outputs).sigmoid()).to(wide(outputs).dtype)

    def variances(outputs: Tensor) -> Tensor:
        return wide(outputs).sigmoid() * (-wide(outputs)).sigmoid()

    def square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
        return (variances(outputs).sqrt() * coefficients).to(outputs.dtype)

    def product(outputs: Tensor, tangent: Tensor) -> Tensor:
        return (variances(outputs) * tangent).to(outputs.dtype)

    def check(outputs: Tensor, targets: Tensor) -> None:
        if targets.dtype != torch.bool:
            check_target_dtype("bernoulli", targets)
        check_target_shape("bernoulli", targets, tuple(outputs.shape))
        if targets.dtype != torch.bool:
            check_target_range("bernoulli", targets, 0.0, 1.0)

    return Likelihood("bernoulli", negative_log_likelihood, sample, square_root, check, product)
