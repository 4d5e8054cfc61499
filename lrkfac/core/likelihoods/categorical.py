"""The categorical likelihood: classes from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrkfac.core.base.arguments import check_number, check_target_shape, check_values
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.eager import has_values
from lrkfac.core.likelihoods.protocol import Likelihood, Weights


def categorical(
    axis: int = -1,
    ignore_index: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Likelihood:
    """Classes from logits: outputs ``[N, C]``, ``[N, T, C]`` or, with ``axis=1``, ``[N, C, H, W]``; integer targets
    of the same shape without the axis of classes.

    The loss is cross-entropy in nats, the same mean as ``torch.nn.functional.cross_entropy`` takes:

        Σ [(1 - ε) c_y (-log p_y) + ε/C Σ_k c_k (-log p_k)] / Σ c_y    over the targets y that are not ignored,

    with class weights ``c`` and label smoothing ``ε``. ``H = diag(p) - p pᵀ``, ``S = diag(√p) - p √pᵀ``, and each
    term's Hessian has the factor ``(1 - ε) c_y + ε/C Σ_k c_k``. Labels are drawn from the model, without smoothing.

    What is ignored says nothing about the outputs: its rows ``g`` are zero. Its rows ``a`` are averaged into the
    input factor ``A`` like all others, since ``A`` is the mean over whatever the layer received.

    Args:
        axis: Where the classes are; not the batch, which is axis 0.
        ignore_index: Targets of this value count for nothing; by default there are none.
        class_weights: ``[C]``, nonnegative.
        label_smoothing: ``ε``, in [0, 1).

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
    importance = None if class_weights is None else _class_weights(class_weights)
    plain = ignore_index is None and importance is None and label_smoothing == 0

    def log_probabilities(outputs: Tensor) -> Tensor:
        outputs = wide(outputs)
        return (outputs if axis in (-1, outputs.ndim - 1) else outputs.movedim(axis, -1)).log_softmax(dim=-1)

    def valid(targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets.long() != ignore_index

    def numbers(targets: Tensor) -> Tensor:
        return targets.long() if ignore_index is None else torch.where(valid(targets), targets.long(), 0)

    def importance_like(outputs: Tensor) -> Tensor:
        assert importance is not None
        return importance.to(device=outputs.device, dtype=wide(outputs).dtype)

    def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        # Nothing is ignored: a label drawn from the model may well have the number that marks what is.
        terms = log_probabilities(outputs).flatten(0, -2), targets.long().flatten()
        return F.nll_loss(*terms, reduction="none", ignore_index=-(2**63)).reshape(targets.shape)

    def weights(outputs: Tensor, targets: Tensor) -> Weights:
        counted = valid(targets).to(wide(outputs).dtype)
        of_target, average = counted, counted
        if importance is not None:
            of_class = importance_like(outputs)
            of_target, average = counted * of_class[numbers(targets)], counted * of_class.mean()
        return Weights(of_target, torch.lerp(of_target, average, label_smoothing) if label_smoothing else of_target)

    def weighted_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = -log_probabilities(outputs)
        at_target = losses.gather(-1, numbers(targets)[..., None])[..., 0]
        terms = weights(outputs, targets).mean * at_target
        if label_smoothing == 0:
            return terms
        uniform = (losses if importance is None else losses * importance_like(outputs)).mean(dim=-1)
        return (1 - label_smoothing) * terms + valid(targets) * (label_smoothing * uniform)

    def sample(outputs: Tensor, noise: Tensor) -> Tensor:
        gumbel = -torch.log(-torch.log(wide(noise)))
        return (wide(outputs) + gumbel).argmax(dim=axis)

    def square_root(outputs: Tensor, coefficients: Tensor) -> Tensor:
        p = wide(outputs).softmax(dim=axis)
        weighted = p.sqrt() * coefficients
        return (weighted - p * weighted.sum(dim=axis, keepdim=True)).to(outputs.dtype)

    def product(outputs: Tensor, tangent: Tensor) -> Tensor:
        p = wide(outputs).softmax(dim=axis)
        return (p * (tangent - (p * tangent).sum(dim=axis, keepdim=True))).to(outputs.dtype)

    def check(outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim < 2 or not -outputs.ndim < axis < outputs.ndim:
            raise ValueError(
                f"categorical: expected outputs [N, C] or, with classes along axis {axis}, of more axes, got shape "
                f"{tuple(outputs.shape)}"
            )
        classes = outputs.shape[axis]
        if importance is not None and importance.shape[0] != classes:
            raise ValueError(
                f"class_weights: expected one for each of {classes} classes (axis {axis} of outputs of shape "
                f"{tuple(outputs.shape)}), got {importance.shape[0]}"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"categorical: expected targets that are class numbers as integers, got {targets.dtype}")
        shape = tuple([s for i, s in enumerate(outputs.shape) if i != axis % outputs.ndim])
        check_target_shape("categorical", targets, shape)
        if not has_values(targets) or (plain and 0 <= int(targets.min()) and int(targets.max()) < classes):
            return  # after few operations: under torch.func each is dear
        outside = valid(targets) & ((targets.long() < 0) | (targets.long() >= classes))
        if outside.any():
            raise ValueError(
                f"categorical: expected targets that are class numbers from 0 to {classes - 1}, got "
                f"{targets[outside][0].item()}; ignore_index names the one that counts for nothing"
            )
        if not plain and not (weights(outputs, targets).mean > 0).any():
            raise ValueError(
                f"categorical: expected targets of which one counts, got a batch in which all are ignored "
                f"(ignore_index={ignore_index}) or of a class of weight 0; leave the batch out"
            )

    return Likelihood(
        "categorical",
        negative_log_likelihood,
        sample,
        square_root,
        check,
        product,
        (axis,),
        None if plain else weights,
        None if plain else weighted_loss,
    )


def _class_weights(given: Tensor | Sequence[float]) -> Tensor:
    try:
        weights = given.detach() if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_weights: expected real numbers [C], got {given!r} ({error})") from error
    check_values(class_weights=weights)
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"class_weights: expected real numbers, got {weights.dtype}")
    if weights.ndim != 1 or not (weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()):
        raise ValueError(f"class_weights: expected finite numbers [C], none negative and not all 0, got {weights}")
    return weights
