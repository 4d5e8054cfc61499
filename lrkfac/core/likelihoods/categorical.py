"""The categorical likelihood: classes from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.arguments import check_number, check_target_shape, check_values
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.eager import has_values
from lrkfac.core.likelihoods.protocol import Likelihood, Weights, quotient


def categorical(
    axis: int = -1,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Likelihood:
    """Return the likelihood of classes given logits: cross-entropy in nats.

    Outputs are ``[N, C]``, ``[N, T, C]`` or, with ``axis=1``, ``[N, C, H, W]``. Targets are integers of the same shape
    without the axis of classes. The loss is the mean that ``torch.nn.functional.cross_entropy`` takes:

        Σ [(1 - ε) c_y (-log p_y) + ε/C Σ_k c_k (-log p_k)] / Σ c_y    over the targets y that are not ignored,

    with class weights ``c`` and label smoothing ``ε``. ``H = diag(p) - p pᵀ``, ``S = diag(√p) - p √pᵀ``, and each
    term's Hessian has the factor ``(1 - ε) c_y + ε/C Σ_k c_k``. Labels are drawn from the model, without smoothing.

    An ignored target says nothing about the outputs: its rows ``g`` are zero. Its rows ``a`` enter the input factor
    ``A`` like all others, since ``A`` is the mean over whatever the layer received.

    Examples:
        >>> import torch
        >>> outputs, targets = torch.zeros(3, 4), torch.tensor([0, 2, -100])
        >>> loss = categorical(ignore_index=-100).loss(outputs, targets)  # log 4
        >>> round(loss.item(), 4)
        1.3863

    Args:
        axis: The axis of the classes; not 0, which is the batch.
        ignore_index: Targets of this value count for nothing; by default there are none.
        class_weights: Nonnegative, ``[C]``; by default 1. Elsewhere than on the outputs' device, they are copied to it
            in each step.
        label_smoothing: ``ε``, in [0, 1).

    Returns:
        The likelihood, for ``evaluator`` and ``joint``.

    Raises:
        ValueError: If an argument is out of range; at evaluation, if outputs have no such axis of classes, class
            weights or targets another shape. Where targets are on the CPU and their values known (neither compiled
            nor transformed by ``torch.func``), also if one is no class number, or their weights add up to 0, such as
            where all are ignored; elsewhere the latter shows as a loss that is not finite.
        TypeError: If an argument is of the wrong type; at evaluation, if targets are no integers.
    """
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis: expected an integer, got {axis!r}")
    if axis == 0:
        raise ValueError("axis: expected the axis of the classes, got 0, which is the batch")
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise TypeError(f"ignore_index: expected an integer or None, got {ignore_index!r}")
    if isinstance(label_smoothing, Tensor):
        raise TypeError("label_smoothing: expected a number, got a tensor")
    check_number(label_smoothing, "label_smoothing", 0, 1)
    importance = None if class_weights is None else _checked_class_weights(class_weights)
    family = _Categorical(axis, ignore_index, importance, label_smoothing)
    return Likelihood(
        "categorical",
        family.negative_log_likelihood,
        family.sample,
        family.square_root,
        family.check,
        family.product,
        (axis,),
        None if family.plain else family.weights,
        None if family.plain else family.weighted_loss,
        family.residual,
    )


@dataclass(frozen=True, eq=False)
class _Categorical:
    """The parts of the likelihood, with the arguments of ``categorical``."""

    axis: int
    ignore_index: int | None
    class_weights: Tensor | None
    label_smoothing: float

    @property
    def plain(self) -> bool:
        """True if all terms count the same."""
        return self.ignore_index is None and self.class_weights is None and self.label_smoothing == 0

    def negative_log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Nothing is ignored: a label drawn from the model may well have the number that marks ignored targets.
        terms = self._log_probabilities(outputs).flatten(0, -2), targets.long().flatten()
        return F.nll_loss(*terms, reduction="none", ignore_index=-(2**63)).reshape(targets.shape)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        gumbel = -torch.log(-torch.log(wide(noise)))
        return (wide(outputs) + gumbel).argmax(dim=self.axis)

    def square_root(self, outputs: Tensor, coefficients: Tensor) -> Tensor:
        p = wide(outputs).softmax(dim=self.axis)
        weighted = p.sqrt() * coefficients
        return (weighted - p * weighted.sum(dim=self.axis, keepdim=True)).to(outputs.dtype)

    def residual(self, outputs: Tensor, score: Tensor) -> Tensor:
        # Of a score, whose entries add up to 0, S takes away nothing but the factor.
        return quotient(wide(score), wide(outputs).softmax(dim=self.axis).sqrt()).to(outputs.dtype)

    def product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        p = wide(outputs).softmax(dim=self.axis)
        return (p * (tangent - (p * tangent).sum(dim=self.axis, keepdim=True))).to(outputs.dtype)

    def weights(self, outputs: Tensor, targets: Tensor) -> Weights:
        counted = self._counts(targets).to(wide(outputs).dtype)
        of_target, average = counted, counted
        if self.class_weights is not None:
            of_class = self._class_weights_like(outputs, self.class_weights)
            of_target, average = counted * of_class[self._numbers(targets)], counted * of_class.mean()
        smoothed = torch.lerp(of_target, average, self.label_smoothing) if self.label_smoothing else of_target
        return Weights(of_target, smoothed)

    def weighted_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = -self._log_probabilities(outputs)
        at_target = losses.gather(-1, self._numbers(targets)[..., None])[..., 0]
        terms = self.weights(outputs, targets).mean * at_target
        if self.label_smoothing == 0:
            return terms
        if self.class_weights is not None:
            losses = losses * self._class_weights_like(outputs, self.class_weights)
        uniform = losses.mean(dim=-1)
        return (1 - self.label_smoothing) * terms + self._counts(targets) * (self.label_smoothing * uniform)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        axis = self.axis
        if outputs.ndim < 2 or not -outputs.ndim < axis < outputs.ndim:
            raise ValueError(
                f"categorical: expected outputs [N, C] or, with classes along axis {axis}, of more axes, got shape "
                f"{tuple(outputs.shape)}"
            )
        classes = outputs.shape[axis]
        if self.class_weights is not None and self.class_weights.shape[0] != classes:
            raise ValueError(
                f"class_weights: expected one for each of {classes} classes (axis {axis} of outputs of shape "
                f"{tuple(outputs.shape)}), got {self.class_weights.shape[0]}"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"categorical: expected targets that are class numbers as integers, got {targets.dtype}")
        shape = tuple([s for i, s in enumerate(outputs.shape) if i != axis % outputs.ndim])
        check_target_shape("categorical", targets, shape)
        if has_values(targets) and targets.numel():
            self._check_target_values(targets, classes)

    def _check_target_values(self, targets: Tensor, classes: int) -> None:
        if self.plain and 0 <= int(targets.min()) and int(targets.max()) < classes:
            return  # after few operations: under torch.func each is dear
        outside = self._counts(targets) & ((targets.long() < 0) | (targets.long() >= classes))
        if outside.any():
            value = targets[outside][0].item()
            raise ValueError(
                f"categorical: expected targets that are class numbers from 0 to {classes - 1}, got {value}; where "
                f"that marks padding, leave it out by categorical(ignore_index={value})"
            )

    def _log_probabilities(self, outputs: Tensor) -> Tensor:
        outputs, axis = wide(outputs), self.axis
        return (outputs if axis in (-1, outputs.ndim - 1) else outputs.movedim(axis, -1)).log_softmax(dim=-1)

    def _counts(self, targets: Tensor) -> Tensor:
        """Return which targets count, as bools."""
        if self.ignore_index is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return targets.long() != self.ignore_index

    def _numbers(self, targets: Tensor) -> Tensor:
        """Return class numbers, 0 in the place of ignored ones."""
        return targets.long() if self.ignore_index is None else torch.where(self._counts(targets), targets.long(), 0)

    def _class_weights_like(self, outputs: Tensor, class_weights: Tensor) -> Tensor:
        return class_weights.to(device=outputs.device, dtype=wide(outputs).dtype)


def _checked_class_weights(class_weights: Tensor | Sequence[float]) -> Tensor:
    try:
        if isinstance(class_weights, Tensor):
            weights = class_weights.detach()
        else:
            weights = torch.tensor(class_weights, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_weights: expected real numbers [C], got {class_weights!r} ({error})") from error
    check_values(class_weights=weights)
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"class_weights: expected real numbers, got {weights.dtype}")
    if weights.ndim != 1 or not (weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()):
        raise ValueError(f"class_weights: expected finite numbers [C], none negative and not all 0, got {weights}")
    return weights
