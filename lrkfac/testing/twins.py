"""A hypothesis strategy of models that arrange their rows in some way, each with a twin written plainly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from lrkfac.core.base.types import Tree
from lrkfac.testing.strategies import generator_of, seeds


class Arrangement(NamedTuple):
    """How rows stand in front of an operation: a way there from ``[N, T, ...]``, and back from ``N``."""

    name: str
    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, int], Tensor]


ARRANGEMENTS = (
    Arrangement("batch, time", lambda x: x, lambda y, n: y),
    Arrangement("time, batch", lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1)),
    Arrangement("batch and time folded", lambda x: x.flatten(0, 1), lambda y, n: y.unflatten(0, (n, -1))),
    Arrangement(
        "time and batch folded",
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, n: y.unflatten(0, (-1, n)).transpose(0, 1),
    ),
    Arrangement("one by one", lambda x: torch.cat(x.unbind(1)), lambda y, n: torch.stack(y.split(n), 1)),
)


def _arranged(arrangement: Arrangement, examples: int, operation: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return arrangement.back(operation(arrangement.there(rows)), examples)


Stage = Callable[[dict[str, Tensor], Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], Tensor], Tensor]
"""From parameters, a function that applies an operation to the rows of ``[N, T, d]``, and these, to new ones."""


def _linear(p: dict[str, Tensor], apply: Any, x: Tensor) -> Tensor:
    return torch.tanh(apply(lambda rows: F.linear(rows, p["w"], p["b"]), x))


def _shared(p: dict[str, Tensor], apply: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.tanh(apply(lambda rows: rows @ p["s"], x))
    return x


def _gated(p: dict[str, Tensor], apply: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(apply(lambda rows: F.linear(rows, p["g"]), x))
    return gate * apply(lambda rows: F.linear(rows, p["v"]), x)


def _normalised(p: dict[str, Tensor], apply: Any, x: Tensor) -> Tensor:
    return apply(lambda rows: F.layer_norm(rows, rows.shape[-1:], p["n"], p["m"]), x)


def _scaled(p: dict[str, Tensor], apply: Any, x: Tensor) -> Tensor:
    return apply(lambda rows: rows * p["c"], x)


def _convolved(p: dict[str, Tensor], apply: Any, x: Tensor) -> Tensor:
    frames = lambda rows: F.conv1d(rows.reshape(-1, 1, rows.shape[-1]), p["k"], padding=1).mean(1).reshape(rows.shape)  # noqa: E731
    return x + apply(frames, x)


STAGES: dict[str, Stage] = {
    "linear": _linear, "shared": _shared, "gated": _gated, "normalised": _normalised, "scaled": _scaled,
    "convolved": _convolved,
}  # fmt: skip


class Twins(NamedTuple):
    """Two models of the same function, the second with the batch in front of all rows, and a batch.

    Attributes:
        name: The stages with their arrangements.
        model: The model.
        twin: The plain one.
        params: Of both.
        inputs: ``[N, T, d]``.
        targets: ``[N]``, classes.
    """

    name: str
    model: Callable[[Tree, Tensor], Tensor]
    twin: Callable[[Tree, Tensor], Tensor]
    params: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor


@st.composite
def twins(draw: st.DrawFn) -> Twins:
    """Draw a model of one to three stages whose rows are folded, transposed, interleaved or shared, and its twin.

    Sizes may coincide: the numbers of examples, positions, features and classes come from the same short range.

    Examples:
        >>> from hypothesis import find
        >>> pair = find(twins(), lambda pair: "folded" in pair.name)
        >>> torch.equal(pair.model(pair.params, pair.inputs), pair.twin(pair.params, pair.inputs))
        True
    """
    size = st.integers(2, 5)
    n, positions, d, classes = draw(size), draw(size), draw(st.integers(3, 5)), draw(size)
    generator = generator_of(draw(seeds))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    names = draw(st.lists(st.sampled_from(sorted(STAGES)), min_size=1, max_size=3, unique=True))
    chosen = [(name, draw(st.sampled_from(ARRANGEMENTS))) for name in names]
    params = {
        "w": normal(d, d), "b": normal(d), "s": normal(d, d), "g": normal(d, d), "v": normal(d, d),
        "n": 1 + 0.3 * normal(d), "m": normal(d), "c": 1 + 0.3 * normal(d), "k": normal(2, 1, 3),
        "head": normal(classes, d),
    }  # fmt: skip
    used = {"linear": "wb", "shared": "s", "gated": "gv", "normalised": "nm", "scaled": "c", "convolved": "k"}
    params = {key: x for key, x in params.items() if key == "head" or any(key in used[name] for name in names)}

    def of(plain: bool) -> Callable[[Tree, Tensor], Tensor]:
        def model(p: Tree, x: Tensor) -> Tensor:
            examples = x.shape[0]
            for name, arrangement in chosen:
                x = STAGES[name](p, partial(_arranged, ARRANGEMENTS[0] if plain else arrangement, examples), x)
            return F.linear(x.mean(1), p["head"])

        return model

    inputs = normal(n, positions, d)
    targets = torch.randint(classes, (n,), generator=generator)
    title = ", ".join(f"{name} ({arrangement.name})" for name, arrangement in chosen)
    return Twins(title, of(False), of(True), params, inputs, targets)
