"""What a model's outputs mean: the loss, samples, and the Hessian of the loss in the outputs.

One rule of normalisation holds for all: some axes of the outputs belong to one *term* of the likelihood
(the classes of a categorical one), the others count terms, and the loss is the mean of the terms'
negative log-likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from lrkfac.core.tree import wide


@dataclass(frozen=True)
class Likelihood:
    """A distribution of targets given outputs, and the parts of it that natural gradient needs.

    For one's own likelihood give the four functions; ``S`` is any square root ``H = S Sᵀ`` of the Hessian
    ``H`` of one term's negative log-likelihood in its outputs (of the Fisher where they differ).

    Attributes:
        name: Shown in error messages.
        negative_log_likelihood: ``(outputs, targets) -> `` one number per term.
        sample: ``(outputs, noise) -> targets`` drawn from the model; ``noise`` is uniform on [0, 1), of the
            shape of ``outputs``.
        square_root: ``(outputs, coefficients) -> S coefficients``, term by term, all of one shape, linear in
            the coefficients.
        check: ``(outputs, targets)``: raises ``ValueError`` or ``TypeError`` where shapes or dtypes do not
            fit; never looks at values.
        product: ``(outputs, tangent) -> H tangent``; by default from ``square_root``.
        event_axes: Axes of the outputs that belong to one term; by default all but the first.
    """

    name: str
    negative_log_likelihood: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Tensor], Tensor]
    square_root: Callable[[Tensor, Tensor], Tensor]
    check: Callable[[Tensor, Tensor], None] | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    event_axes: tuple[int, ...] | None = None

    def terms(self, outputs: Tensor) -> int:
        """Number of terms of which the loss is the mean."""
        if self.event_axes is None:
            return outputs.shape[0]
        return outputs.numel() // max(math.prod([outputs.shape[axis] for axis in self.event_axes]), 1)

    def hessian_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """``H tangent``, term by term, of the shape of ``outputs``."""
        if self.product is not None:
            return self.product(outputs, tangent)
        _, transpose = vjp(lambda z: self.square_root(outputs, z), torch.zeros_like(outputs))
        return self.square_root(outputs, transpose(tangent)[0])


def categorical() -> Likelihood:
    """Classes from logits: outputs ``[N, C]`` (or ``[N, ..., C]``), integer targets ``[N]`` (``[N, ...]``).

    The loss is cross-entropy. ``H = diag(p) - p pᵀ``, ``S = diag(√p) - p √pᵀ``.

    Raises:
        ValueError: At evaluation, if outputs have no axis of classes or targets another shape.
        TypeError: At evaluation, if targets are no integers.
    """

    def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        log_probabilities = wide(outputs).log_softmax(dim=-1)
        return -log_probabilities.gather(-1, targets.long()[..., None])[..., 0]

    def sample(outputs: Tensor, noise: Tensor) -> Tensor:
        gumbel = -torch.log(-torch.log(wide(noise)))
        return (wide(outputs) + gumbel).argmax(dim=-1)

    def square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
        p = outputs.softmax(dim=-1)
        weighted = p.sqrt() * coefficients
        return weighted - p * (p.sqrt() * coefficients).sum(dim=-1, keepdim=True)

    def product(outputs: Tensor, tangent: Tensor) -> Tensor:
        p = outputs.softmax(dim=-1)
        return p * (tangent - (p * tangent).sum(dim=-1, keepdim=True))

    def check(outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim < 2:
            raise ValueError(f"categorical: expected outputs [N, C], got shape {tuple(outputs.shape)}")
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"categorical: expected class numbers as integers, got {targets.dtype}")
        _check_shape("categorical", targets, tuple(outputs.shape[:-1]))

    return Likelihood("categorical", negative_log_likelihood, sample, square_root, check, product, (-1,))


def gaussian(variance: float = 1.0) -> Likelihood:
    """Numbers with a known variance: outputs and targets ``[N, ...]``, summed over all axes but the first.

    The loss is ``Σ (s - y)² / (2 variance)`` without the normalising constant; ``H = I / variance``.

    Args:
        variance: Variance of each target, in the square of the targets' unit.

    Raises:
        ValueError: If ``variance`` is not positive and finite.
    """
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"variance: expected a positive finite number, got {variance}")
    deviation = math.sqrt(variance)

    def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        error = wide(outputs) - targets.to(wide(outputs).dtype)
        return _sum_per_example(error.square()) / (2 * variance)

    def sample(outputs: Tensor, noise: Tensor) -> Tensor:
        smallest = torch.finfo(wide(noise).dtype).eps / 2
        centred = 2 * wide(noise).clamp(smallest, 1 - smallest) - 1
        return wide(outputs) + deviation * math.sqrt(2) * torch.erfinv(centred)

    def square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients / deviation

    def product(outputs: Tensor, tangent: Tensor) -> Tensor:
        return tangent / variance

    def check(outputs: Tensor, targets: Tensor) -> None:
        _check_floating("gaussian", targets)
        _check_shape("gaussian", targets, tuple(outputs.shape))

    return Likelihood("gaussian", negative_log_likelihood, sample, square_root, check, product)


def bernoulli() -> Likelihood:
    """Numbers in [0, 1] from logits: outputs and targets ``[N, ...]``, summed over all axes but the first.

    The loss is binary cross-entropy in nats; ``H = diag(p (1 - p))``.
    """

    def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        logits = wide(outputs)
        return _sum_per_example(F.softplus(logits) - logits * targets.to(logits.dtype))

    def sample(outputs: Tensor, noise: Tensor) -> Tensor:
        return (wide(noise) < wide(outputs).sigmoid()).to(wide(outputs).dtype)

    def square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
        return (outputs.sigmoid() * (-outputs).sigmoid()).sqrt() * coefficients

    def product(outputs: Tensor, tangent: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid() * tangent

    def check(outputs: Tensor, targets: Tensor) -> None:
        if targets.dtype != torch.bool:
            _check_floating("bernoulli", targets)
        _check_shape("bernoulli", targets, tuple(outputs.shape))

    return Likelihood("bernoulli", negative_log_likelihood, sample, square_root, check, product)


def _sum_per_example(x: Tensor) -> Tensor:
    return x.flatten(1).sum(dim=1) if x.ndim > 1 else x


def _check_floating(name: str, targets: Tensor) -> None:
    if not targets.is_floating_point():
        raise TypeError(f"{name}: expected floating-point targets, got {targets.dtype}; convert them with .float()")


def _check_shape(name: str, targets: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(targets.shape) != shape:
        raise ValueError(f"{name}: expected targets of shape {shape}, got {tuple(targets.shape)}")
