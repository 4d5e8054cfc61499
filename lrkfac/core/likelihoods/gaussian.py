"""The Gaussian likelihood: numbers with known variances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_target_dtype, check_target_shape, check_values
from lrkfac.core.base.dtypes import wide
from lrkfac.core.likelihoods.protocol import Likelihood, sum_per_example


def gaussian(variance: float | Tensor = 1.0) -> Likelihood:
    """Return the likelihood of numbers with known variances: squared error.

    Outputs and targets are ``[N, ...]``, and all axes but the first are summed over. The loss is
    ``Σ (s - y)² / (2 variance)`` without the normalising constant; ``H = diag(1 / variance)``.

    Examples:
        >>> import torch
        >>> outputs, targets = torch.zeros(2, 3), torch.ones(2, 3)
        >>> gaussian().loss(outputs, targets)  # 3 times 1/2
        tensor(1.5000)

    Args:
        variance: Of each target, in the square of its unit: one number, or a tensor that broadcasts against the
            outputs of one example, such as ``[D]`` for outputs ``[N, D]``. A constant: it gets no gradient.
            Elsewhere than on the outputs' device, a tensor is copied to it in each step.

    Returns:
        The likelihood, for ``evaluator`` and ``joint``.

    Raises:
        ValueError: If ``variance`` is not positive and finite; at evaluation, if it does not broadcast, or targets
            have another shape than outputs.
        TypeError: If ``variance`` is no number and no tensor; at evaluation, if targets are no floating-point numbers.
    """
    if isinstance(variance, bool) or not isinstance(variance, int | float | Tensor):
        raise TypeError(f"variance: expected a number or a tensor, got {variance!r}")
    values = (
        variance.detach() if isinstance(variance, Tensor) else torch.tensor(variance, dtype=torch.float64, device="cpu")
    )
    check_values(variance=values)
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"variance: expected a number or a tensor, got one of {values.dtype}")
    if not (values.isfinite().all() and (values > 0).all()):
        raise ValueError(f"variance: expected a positive finite number, or a tensor of them, got {variance}")
    family = _Gaussian(values if isinstance(variance, Tensor) else variance)
    return Likelihood(
        "gaussian",
        family.negative_log_likelihood,
        family.sample,
        family.square_root,
        family.check,
        family.product,
        residual=family.residual,
    )


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """The parts of the likelihood, with the argument of ``gaussian``."""

    variance: float | Tensor

    def negative_log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = wide(outputs) - targets.to(wide(outputs).dtype)
        return sum_per_example(error.square() / (2 * self._variance_like(outputs)))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        smallest = torch.finfo(wide(noise).dtype).eps / 2
        centred = 2 * wide(noise).clamp(smallest, 1 - smallest) - 1
        return wide(outputs) + (2 * self._variance_like(outputs)) ** 0.5 * torch.erfinv(centred)

    def square_root(self, outputs: Tensor, coefficients: Tensor) -> Tensor:
        return (wide(coefficients) / self._variance_like(outputs) ** 0.5).to(outputs.dtype)

    def product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        return (wide(tangent) / self._variance_like(outputs)).to(outputs.dtype)

    def residual(self, outputs: Tensor, score: Tensor) -> Tensor:
        return (wide(score) * self._variance_like(outputs) ** 0.5).to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        one = tuple(outputs.shape[1:])
        shape = tuple(self.variance.shape) if isinstance(self.variance, Tensor) else ()
        trailing = one[len(one) - len(shape) :]
        if len(shape) > len(one) or any(v not in (1, size) for v, size in zip(shape, trailing, strict=True)):
            raise ValueError(
                f"variance: expected a shape that broadcasts against {one}, the outputs of one example, got {shape}"
            )
        check_target_dtype("gaussian", targets)
        check_target_shape("gaussian", targets, tuple(outputs.shape))

    def _variance_like(self, outputs: Tensor) -> Tensor | float:
        if isinstance(self.variance, Tensor):
            return self.variance.to(device=outputs.device, dtype=wide(outputs).dtype)
        return self.variance
