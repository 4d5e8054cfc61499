"""The protocol of likelihoods: the distribution of targets given outputs, and the one rule of normalisation.

Some axes of the outputs belong to one *term* of the likelihood (the classes of a categorical one), the others
count terms. With the loss ``lₙ`` and the weight ``wₙ`` of each term, and ``Jₙ`` the derivative of its outputs in the
parameters,

    loss = Σ lₙ / Σ wₙ,    F = Σ hₙ Jₙᵀ Hₙ Jₙ / Σ wₙ,    Hₙ = Sₙ Sₙᵀ = E[sₙ sₙᵀ],

where ``Hₙ`` is the Fisher matrix of the distribution in its outputs and ``sₙ`` the derivative of its negative
log-likelihood at a target drawn from it. Without options ``lₙ`` is that negative log-likelihood and
``wₙ = hₙ = 1``: the loss is a mean. ``hₙ Hₙ`` is the expected Hessian of ``lₙ``, so that ``F`` is the generalized
Gauss-Newton matrix of the loss. The rows that enter ``B`` are ``√hₙ Sₙ``, column by column, or ``√hₙ sₙ``, and its
scale is ``1 / Σ wₙ``: the first is the expectation of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import debug_unwrap, grad, vjp

from lrkfac.core.base.arguments import check_function
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.eager import has_values


class Weights(NamedTuple):
    """The weights of the terms of a likelihood, each of the shape of the outputs without the axes of one term.

    Examples:
        >>> import torch
        >>> from lrkfac import categorical
        >>> outputs, targets = torch.zeros(3, 2), torch.tensor([0, 1, -1])
        >>> weights = categorical(ignore_index=-1, class_weights=[1.0, 3.0]).weights(outputs, targets)
        >>> weights.mean.tolist()
        [1.0, 3.0, 0.0]

    Attributes:
        mean: ``w``, the weight of the term in the mean.
        hessian: ``h``, the factor of its Hessian.
    """

    mean: Tensor
    hessian: Tensor


@dataclass(frozen=True)
class Likelihood:
    """A distribution of targets given outputs, by the functions that natural gradient needs.

    A custom likelihood needs the first four, and ``lrkfac.testing.check_likelihood`` checks that they fit together.
    ``S`` is any square root ``H = S Sᵀ`` of the Fisher matrix ``H`` of one term in its outputs: the Hessian of its
    negative log-likelihood where that does not depend on targets, else its expectation over targets that are drawn. A
    likelihood copies and pickles where its functions do.

    Examples:
        >>> import torch
        >>> laplace = Likelihood(
        ...     "laplace",
        ...     negative_log_likelihood=lambda outputs, targets: (outputs - targets).abs().sum(1),
        ...     sample=lambda outputs, noise: outputs + torch.where(noise < 0.5, -1.0, 1.0),
        ...     square_root=lambda outputs, coefficients: coefficients,
        ... )
        >>> laplace.loss(torch.zeros(5, 3), torch.ones(5, 3))
        tensor(3.)

    Attributes:
        name: The name in error messages.
        negative_log_likelihood: ``(outputs, targets) -> `` one number per term.
        sample: ``(outputs, noise) -> targets`` drawn from the model; ``noise`` is uniform on [0, 1), of the
            shape of ``outputs``. Any law will do under which the gradient has mean 0 and covariance ``H``.
        square_root: ``(outputs, coefficients) -> S coefficients``, term by term, all of one shape, linear in
            the coefficients.
        check: ``(outputs, targets)``: raises ``ValueError`` or ``TypeError`` where shapes or dtypes do not fit.
        product: ``(outputs, tangent) -> H tangent``; by default from ``square_root``.
        event_axes: Axes of the outputs that belong to one term; by default all but the first.
        weights: ``(outputs, targets) -> Weights`` of the terms, not a function of the outputs' values; by default 1.
        weighted_loss: ``(outputs, targets) -> `` one number per term, which the loss sums up; by default the
            negative log-likelihood times ``weights(...).mean``.
        residual: ``(outputs, score) -> `` coefficients with ``S coefficients = score``, term by term, where ``score``
            is the derivative of a term in its outputs, times any number; only for ``precondition_in_sample_space``.

    Raises:
        TypeError: If ``name`` is no string, or one of the functions is none.
        ValueError: If ``event_axes`` are no axes, or the batch is among them.
    """

    name: str
    negative_log_likelihood: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Tensor], Tensor]
    square_root: Callable[[Tensor, Tensor], Tensor]
    check: Callable[[Tensor, Tensor], None] | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    event_axes: tuple[int, ...] | None = None
    weights: Callable[[Tensor, Tensor], Weights] | None = None
    weighted_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    residual: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {type(self.name).__name__}")
        for name in ("negative_log_likelihood", "sample", "square_root"):
            check_function(getattr(self, name), name)
        for name in ("check", "product", "weights", "weighted_loss", "residual"):
            if getattr(self, name) is not None:
                check_function(getattr(self, name), name, "a function or None")
        axes = self.event_axes
        if axes is not None and not (isinstance(axes, tuple) and all(type(axis) is int and axis for axis in axes)):
            raise ValueError(f"event_axes: expected a tuple of axes other than 0, the batch, got {axes!r}")

    def facts(self) -> str:
        """Return the name, and the settings where functions are methods of a dataclass, in words."""
        settings = getattr(self.negative_log_likelihood, "__self__", None)
        return f"{self.name} {settings}" if is_dataclass(settings) else self.name

    def terms(self, outputs: Tensor) -> int:
        """Return the number of terms, also counting terms of weight 0."""
        if self.event_axes is None:
            return outputs.shape[0]
        return outputs.numel() // max(math.prod([outputs.shape[axis] for axis in self.event_axes]), 1)

    def loss(self, outputs: Tensor, targets: Tensor, total: Tensor | None = None) -> Tensor:
        """Return the loss ``Σ lₙ / Σ wₙ``, ``[]``, or ``Σ lₙ / total`` of a part of a batch, which may be empty.

        Raises:
            ValueError: If targets do not fit the outputs or are on another device, the terms are not as many as
                ``event_axes`` says, or, where values are known, none of a whole batch counts.
            TypeError: If targets have the wrong dtype.
        """
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
        if targets.device != outputs.device:
            raise ValueError(f"targets: expected a tensor on {outputs.device}, as the outputs, got {targets.device}")
        if self.check is not None:
            self.check(outputs, targets)
        terms = (self.weighted_loss or self.negative_log_likelihood)(outputs, targets)
        if terms.numel() != self.terms(outputs):
            raise ValueError(
                f"likelihood {self.name!r}: expected one negative log-likelihood for each of {self.terms(outputs)} "
                f"terms, got the shape {tuple(terms.shape)}; see event_axes"
            )
        if self.weights is None:
            return terms.mean() if total is None else terms.sum() / total
        weight = self.weights(outputs, targets).mean
        if self.weighted_loss is None:
            terms = terms.reshape(weight.shape) * weight
        if total is not None:
            return terms.sum() / total
        total = weight.sum()
        if has_values(targets) and not (debug_unwrap(total, recurse=True) > 0).all():
            raise ValueError(
                f"{self.name}: expected targets of which one counts, got a batch in which all are ignored, or of a "
                "class of weight 0; leave the batch out"
            )
        return terms.sum() / total

    def total_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``Σ wₙ``, ``[]``."""
        if self.weights is None:
            return torch.full((), self.terms(outputs), dtype=wide(outputs).dtype, device=outputs.device)
        return self.weights(outputs, targets).mean.sum()

    def weighted_score(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        """Return ``√hₙ sₙ`` of every term, at targets drawn with ``noise``; of the shape and dtype of ``outputs``."""
        drawn = self.sample(outputs, noise)
        score: Tensor = grad(lambda f: self.negative_log_likelihood(f, drawn).sum())(outputs)
        return self._weighted(score, outputs, targets, root=True)

    def weighted_root(self, outputs: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
        """Return ``√hₙ Sₙ coefficientsₙ`` of every term, of the shape and dtype of ``outputs``."""
        return self._weighted(self.square_root(outputs, coefficients), outputs, targets, root=True)

    def weighted_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """Return ``hₙ Hₙ tangentₙ`` of every term, of the shape and dtype of ``outputs``."""
        return self._weighted(self.hessian_product(outputs, tangent), outputs, targets, root=False)

    def hessian_product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """Return ``H tangent``, term by term, of the shape of ``outputs``."""
        if self.product is not None:
            return self.product(outputs, tangent)
        _, transpose = vjp(lambda z: self.square_root(outputs, z), torch.zeros_like(outputs))
        return self.square_root(outputs, transpose(tangent)[0])

    def weighted_residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return coefficients with ``√hₙ Sₙ coefficientsₙ`` the derivative of ``lₙ``, of the shape of ``outputs``."""
        assert self.residual is not None
        score: Tensor = grad(lambda f: self.weighted_terms(f, targets).sum())(outputs)
        coefficients = self.residual(outputs, score)
        if self.weights is None:
            return coefficients
        return quotient(wide(coefficients), self._hessian_weight(outputs, targets).sqrt())

    def weighted_terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``lₙ`` of every term."""
        terms = (self.weighted_loss or self.negative_log_likelihood)(outputs, targets)
        if self.weights is None or self.weighted_loss is not None:
            return terms
        weight = self.weights(outputs, targets).mean
        return terms.reshape(weight.shape) * weight

    def _weighted(self, x: Tensor, outputs: Tensor, targets: Tensor, root: bool) -> Tensor:
        if self.weights is None:
            return x.to(outputs.dtype)
        weight = self._hessian_weight(outputs, targets)
        return ((weight.sqrt() if root else weight) * wide(x)).to(outputs.dtype)

    def _hessian_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``hₙ``, which broadcasts against the outputs."""
        assert self.weights is not None
        weight = self.weights(outputs, targets).hessian
        inner = range(1, outputs.ndim) if self.event_axes is None else [a % outputs.ndim for a in self.event_axes]
        return weight.reshape([1 if axis in inner else size for axis, size in enumerate(outputs.shape)])


def quotient(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x / y``, and 0 where ``y`` is."""
    return torch.where(y == 0, 0, x / torch.where(y == 0, 1, y)).to(x.dtype)


def sum_per_example(x: Tensor) -> Tensor:
    """Return the sum over all axes but the first, ``[N]``."""
    return x.flatten(1).sum(dim=1) if x.ndim > 1 else x
