"""Text that every Python ships, and a transformer of characters as a pure function."""

from __future__ import annotations

import math
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_CHARACTERS = 400_000
"""Number of characters used, from the first; every supported Python ships more."""
HEADS = 4

Params = dict[str, Tensor]


def text_codes(characters: int = TEXT_CHARACTERS) -> tuple[Tensor, str]:
    """Return Python's reference (``pydoc_data.topics``) as numbers, and the characters that they stand for.

    Characters outside ASCII are one, ``"?"`` by another number.
    """
    return codes_of("".join(topics.topics[name] for name in sorted(topics.topics))[:characters])


def codes_of(text: str) -> tuple[Tensor, str]:
    """Return a text as numbers, and the characters that they stand for, as ``text_codes``."""
    codes = torch.tensor([min(ord(character), 128) for character in text])
    kinds, codes = codes.unique(return_inverse=True)
    return codes, "".join("?" if kind == 128 else chr(kind) for kind in kinds.tolist())


def text_windows(length: int, characters: int = TEXT_CHARACTERS) -> tuple[Tensor, Tensor, int]:
    """Return the text in windows ``[windows, length]``: characters, those that follow, and how many there are."""
    codes, kinds = text_codes(characters)
    return *windows(codes, length), len(kinds)


def windows(codes: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return windows ``[windows, length]`` of a text: characters, and those that follow."""
    number = (len(codes) - 1) // length
    used = number * length
    return codes[:used].reshape(number, length), codes[1 : used + 1].reshape(number, length)


def transformer(params: Params, tokens: Tensor) -> Tensor:
    """Return logits of the next characters ``[N, T, V]``: normalisation first, as in GPT-2."""
    length, width = tokens.shape[1], params["embedding"].shape[1]
    x = F.embedding(tokens, params["embedding"]) + params["position"][:length]
    ahead = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    for i in range(sum(name.endswith(".up.weight") for name in params)):
        p = {name.removeprefix(f"{i}."): leaf for name, leaf in params.items() if name.startswith(f"{i}.")}
        y = F.layer_norm(x, (width,), p["norm1.weight"], p["norm1.bias"])
        q, k, v = (
            F.linear(y, p[f"{n}.weight"], p[f"{n}.bias"]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv"
        )
        scores = (q @ k.mT / math.sqrt(width // HEADS)).masked_fill(ahead, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, p["out.weight"], p["out.bias"])
        y = F.layer_norm(x, (width,), p["norm2.weight"], p["norm2.bias"])
        x = x + F.linear(F.gelu(F.linear(y, p["up.weight"], p["up.bias"])), p["down.weight"], p["down.bias"])
    x = F.layer_norm(x, (width,), params["norm.weight"], params["norm.bias"])
    return F.linear(x, params["head.weight"], params["head.bias"])


def init_transformer(seed: int, vocabulary: int, context: int, width: int, blocks: int) -> Params:
    """GPT-2's: weights of standard deviation 0.02, those before a residual sum smaller by √(2 · blocks)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return nn.init.normal_(torch.empty(shape), std=std, generator=generator)

    params = {"embedding": normal(vocabulary, width), "position": normal(context, width)}
    linear = {"q": (width, width), "k": (width, width), "v": (width, width), "out": (width, width),
              "up": (4 * width, width), "down": (width, 4 * width)}  # fmt: skip
    for i in range(blocks):
        for name, shape in linear.items():
            std = 0.02 / math.sqrt(2 * blocks) if name in ("out", "down") else 0.02
            params[f"{i}.{name}.weight"], params[f"{i}.{name}.bias"] = normal(*shape, std=std), torch.zeros(shape[0])
    for norm in ("norm", *(f"{i}.norm{j}" for i in range(blocks) for j in (1, 2))):
        params[f"{norm}.weight"], params[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
    params["head.weight"], params["head.bias"] = normal(vocabulary, width), torch.zeros(vocabulary)
    return params
