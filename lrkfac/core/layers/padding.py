"""Forward derivatives of embeddings with padding, whose row of the weight is a constant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.kinds import EMBEDDING


class ConstantPadding(TorchFunctionMode):
    """Sets the derivative of an embedding at its padding to zero, as torch does in reverse but not in forward mode."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        padding = _padding(*args, **(kwargs or {})) if func is F.embedding else None
        return result if padding is None else torch.where(padding[..., None], result.detach(), result)


def _padding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
    return None if padding_idx is None else input == padding_idx % weight.shape[0]


def with_constant_padding(layers: Layers) -> AbstractContextManager[Any]:
    """Return ``ConstantPadding`` where a layer is an embedding with padding, else an empty context."""
    uses = [use for layer in layers for use in zip(layer.kinds, layer.options, strict=True)]
    padded = any(kind == EMBEDDING.name and options[1] is not None for kind, options in uses)
    return ConstantPadding() if padded else nullcontext()
