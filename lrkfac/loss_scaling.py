"""What ``torch.amp.GradScaler`` asks of an optimizer whose gradients are not those of a scaled loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def told_by_scaler(attributes: dict[str, Any], evaluates: bool) -> Iterator[bool]:
    """Enter a step; its value tells whether a ``GradScaler`` saw infinity or NaN in ``.grad``.

    The scaler puts its findings into attributes, and removes them after a step that raises nothing.

    Args:
        attributes: Of the optimizer, by name.
        evaluates: Whether the step evaluates a batch, or calls a closure.

    Raises:
        ValueError: If the scaler has divided ``.grad``, which nothing had multiplied, or has not seen what the step
            would evaluate.
    """
    try:
        if "grad_scale" in attributes and attributes["grad_scale"] is None:
            raise ValueError(
                "step: unscale_() has divided .grad by the scale of the GradScaler, but evaluate() sets .grad without "
                "it; leave out scaler.unscale_(optimizer), call zero_grad() and evaluate() again"
            )
        if "grad_scale" in attributes and evaluates:
            raise ValueError(
                "step: a GradScaler looks at .grad before the step; call evaluate(inputs, targets) first, and then "
                "scaler.step(optimizer) without batch or closure"
            )
        yield bool(attributes.get("found_inf", False))
    except BaseException:
        attributes.pop("grad_scale", None)
        attributes.pop("found_inf", None)
        raise
