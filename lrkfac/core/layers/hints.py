"""What would make a call the use of a layer, in words, for calls that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.parsers import PRODUCTS


def hint(func: Callable[..., Any], custom: tuple[LayerKind, ...]) -> str:
    """Return what to do about a function that received a parameter and is no layer, in brackets; empty for most.

    Args:
        func: The function, in a call that no parser takes.
        custom: The custom layer kinds of the description.
    """
    if isinstance(func, LayerKind) and func not in custom:
        return " (pass kinds=[...] with it to find_layers)"
    if func is torch.einsum:
        return " (covered for one weight and one input that have only summed indices in common)"
    if func in PRODUCTS:
        return " (covered for a weight with two axes and an input with an axis of examples)"
    return ""
