"""``multi_head_attention_forward`` written out: the original reaches a ``TorchFunctionMode`` as one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what ``torch.nn.functional.multi_head_attention_forward`` returns for arguments that it accepts.

    The four projections are calls of ``F.linear`` with the batch in front. Shapes are not checked.
    """
    batched = query.ndim == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    is_causal = is_causal and key_padding_mask is None
    attn_mask = None if is_causal and not need_weights else attn_mask
    packed = None if use_separate_proj_weight or in_proj_weight is None else in_proj_weight.chunk(3)
    weights: Any = packed or (q_proj_weight, k_proj_weight, v_proj_weight)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = [F.linear(x.transpose(0, 1), w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    n, added = q.shape[0], int(add_zero_attn)
    if bias_k is not None and bias_v is not None:
        k, v, added = torch.cat([k, bias_k.repeat(n, 1, 1)], 1), torch.cat([v, bias_v.repeat(n, 1, 1)], 1), added + 1
    q, k, v = [x.reshape(n, x.shape[1], num_heads, -1).transpose(1, 2) for x in (q, k, v)]
    k = k if static_k is None else static_k.reshape(n, num_heads, *static_k.shape[1:])
    v = v if static_v is None else static_v.reshape(n, num_heads, *static_v.shape[1:])
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    dropout = dropout_p if training else 0.0
    mask = _mask(attn_mask, key_padding_mask, n, added, query.dtype)
    attention: Tensor | None = None
    if need_weights:
        attention = _attention_weights(q, k, mask, dropout)
        context = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    outputs = F.linear(context.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if not batched:
        return outputs.squeeze(0), None if attention is None else attention.squeeze(0)
    return outputs.transpose(0, 1).contiguous(), attention


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return F.dropout(weights, dropout) if dropout else weights


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, n: int, added: int, dtype: torch.dtype
) -> Tensor | None:
    """Return what is added to the scores ``[n, heads, T, S + added]``; added keys are not masked.

    ``attn_mask`` is ``[T, S]`` or ``[n * heads, T, S]``, ``key_padding_mask`` ``[n, S]``.
    """
    masks = []
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
            masks.append(F.pad(mask, (0, added)))
    if attn_mask is not None and attn_mask.ndim == 3:
        masks[0] = masks[0].reshape(n, -1, *masks[0].shape[1:])
    if key_padding_mask is not None:
        masks[-1] = masks[-1][:, None, None, :]
    return sum(masks[1:], masks[0]) if masks else None
