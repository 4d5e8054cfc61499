"""What is inside ``multi_head_attention_forward``, which hands itself to a function mode whole."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _open_attention() -> Callable[..., Any]:
    """``multi_head_attention_forward`` with its inner calls in sight.

    The function hands itself to a function mode whole. Its own code, told that nobody watches, calls the
    functions of its module, which the mode then sees one by one. It works on ``[T, N, E]``; its four projections
    are seen with the batch in front.
    """
    whole = F.multi_head_attention_forward

    def project(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x.transpose(0, 1), w, b).transpose(0, 1).contiguous()

    def by_parts(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
        biases = [None] * 3 if b is None else b.chunk(3)
        return [project(x, wi, bi) for x, wi, bi in zip((q, k, v), w.chunk(3), biases, strict=True)]

    def separately(q: Tensor, k: Tensor, v: Tensor, *weights: Any) -> list[Tensor]:
        return [project(x, wi, bi) for x, wi, bi in zip((q, k, v), weights[:3], weights[3:], strict=True)]

    def opened(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise ValueError(
                "nn.MultiheadAttention: its layers cannot be captured inside torch.compile; evaluate statistics "
                "outside the compiled function, or write attention with F.linear and F.scaled_dot_product_attention"
            )
        examples = query.shape[1] if query.ndim == 3 else 1

        def output(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return project(x.unflatten(0, (-1, examples)), w, b).flatten(0, 1)

        names = {
            **whole.__globals__, "has_torch_function": lambda *a: False, "linear": output,
            "_in_projection_packed": by_parts, "_in_projection": separately,
        }  # fmt: skip
        inner = types.FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)
        inner.__kwdefaults__ = whole.__kwdefaults__
        return inner(query, *args, **kwargs)

    return opened


OPENED: dict[Callable[..., Any], Callable[..., Any]] = {F.multi_head_attention_forward: _open_attention()}
"""Functions that reach a function mode whole, and what to call instead to see what is inside."""
