"""The Gaussian likelihood: numbers with known variances."""

from __future__ import annotations

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_target_dtype, check_target_shape, check_values
from lrkfac.core.base.dtypes import wide
from lrkfac.core.likelihoods.protocol import Likelihood, sum_per_example


def gaussian(variance: float | Tensor = 1.0) -> Likelihood:
    """Numbers with known variances: outputs and targets ``[N, ...]``, summed over all axes but the first.

    The loss is ``Σ (s - y)² / (2 variance)`` without the normalising constant; ``H = diag(1 / variance)``.

    Args:
        variance: Of each target, in the square of its unit: one number, or a tensor that broadcasts against the
            outputs of one example, such as ``[D]`` for outputs ``[N, D]``. A constant: it gets no gradient.

    Raises:
        ValueError: If ``variance`` is not positive and finite; at evaluation, if it does not broadcast, or targets
            have another shape than outputs.
        TypeError: If ``variance`` is no number and no tensor; at evaluation, if targets are no floating-point numbers.
    """
    if isinstance(variance, bool) or not isinstance(variance, int | float | Tensor):
        raise TypeError(f"variance: expected a number or a tensor, got {variance!r}")
    given = variance.detach() if isinstance(variance, Tensor) else torch.tensor(variance, dtype=torch.float64)
    check_values(variance=given)
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"variance: expected a number or a tensor, got one of {given.dtype}")
    if not (given.isfinite().all() and (given > 0).all()):
        raise ValueError(f"variance: expected a positive finite number, or a tensor of them, got {variance}")

    def variances(outputs: Tensor) -> Tensor | float:
        return given.to(device=outputs.device, dtype=wide(outputs).dtype) if isinstance(variance, Tensor) else variance

    def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        error = wide(outputs) - targets.to(wide(outputs).dtype)
        return sum_per_example(error.square() / (2 * variances(outputs)))

    def sample(outputs: Tensor, noise: Tensor) -> Tensor:
        smallest = torch.finfo(wide(noise).dtype).eps / 2
        centred = 2 * wide(noise).clamp(smallest, 1 - smallest) - 1
        return wide(outputs) + (2 * variances(outputs)) ** 0.5 * torch.erfinv(centred)

    def square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
        return (wide(coefficients) / variances(outputs) ** 0.5).to(outputs.dtype)

    def product(outputs: Tensor, tangent: Tensor) -> Tensor:
        return (wide(tangent) / variances(outputs)).to(outputs.dtype)

    def check(outputs: Tensor, targets: Tensor) -> None:
        one, shape = tuple(outputs.shape[1:]), tuple(given.shape)
        trailing = one[len(one) - len(shape) :]
        if len(shape) > len(one) or any(v not in (1, size) for v, size in zip(shape, trailing, strict=True)):
            raise ValueError(
                f"variance: expected a shape that broadcasts against {one}, the outputs of one example, got {shape}"
            )
        check_target_dtype("gaussian", targets)
        check_target_shape("gaussian", targets, tuple(outputs.shape))

    return Likelihood("gaussian", negative_log_likelihood, sample, square_root, check, product)
