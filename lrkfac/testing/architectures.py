"""A hypothesis strategy of small models: pure functions of every layer kind, way of writing and parameter tree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from lrkfac.core.base.types import Tree
from lrkfac.core.likelihoods.bernoulli import bernoulli
from lrkfac.core.likelihoods.categorical import categorical
from lrkfac.core.likelihoods.gaussian import gaussian
from lrkfac.core.likelihoods.protocol import Likelihood
from lrkfac.testing.strategies import dtypes, generator_of, seeds

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.tanh, F.gelu, torch.sigmoid, lambda x: x, lambda x: F.relu(x, inplace=True),
)  # fmt: skip
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

Operation = Callable[[list[Tensor], Tensor], Tensor]
"""From the parameters of a stage, a weight and perhaps a bias, and its input to its output."""


class Architecture(NamedTuple):
    """A model with parameters, likelihood and a batch.

    ``weights`` are the places of the weight matrices among ``optree.tree_leaves(params)``.
    """

    model: Callable[[Tree, Tensor], Tensor]
    params: Tree
    inputs: Tensor
    targets: Tensor
    likelihood: Likelihood
    weights: tuple[int, ...]


class Affine(NamedTuple):
    """Parameters of a stage with a bias."""

    weight: Any
    bias: Any


class Linear(NamedTuple):
    """Parameters of a stage without one."""

    weight: Any


@st.composite
def architectures(draw: st.DrawFn, max_depth: int = 4, dtype: torch.dtype | None = None) -> Architecture:
    """Draw models ``[N, ...] -> [N, ..., C]`` on rows, sequences, images of one to three axes or tokens.

    Their layers are linear layers in any spelling, convolutions, embeddings (also tied), normalisations, scales and
    shifts, with activations (also in place), residual connections and weights that are used several times.

    Examples:
        >>> from hypothesis import given
        >>> @given(architectures(max_depth=0))
        ... def test(case):
        ...     assert case.model(case.params, case.inputs).shape[0] == case.inputs.shape[0]
        >>> test()

    Args:
        draw: Passed by hypothesis.
        max_depth: The largest number of stages between the first and the last.
        dtype: The dtype of parameters and inputs; by default drawn, too.

    Returns:
        The model with parameters, likelihood and a batch.
    """
    builder = _Builder(draw, dtype or draw(dtypes))
    inputs = builder.start()
    for _ in range(draw(st.integers(0, max_depth))):
        builder.stage()
    outputs = builder.finish()
    likelihood: Likelihood = draw(st.sampled_from([categorical(), gaussian(), bernoulli()]))
    noise = torch.rand(outputs.shape, generator=builder.generator, dtype=torch.float64).to(outputs.dtype)
    targets = likelihood.sample(torch.zeros_like(outputs), noise)
    wrap, read = draw(st.sampled_from(FORMS))
    stages, steps = builder.stages, builder.steps

    def model(params: Tree, x: Tensor) -> Tensor:
        for operation, source in steps:
            x = operation(read(params, source) if source is not None else [], x)
        return x

    return Architecture(model, wrap(stages), inputs, targets, likelihood, tuple(builder.places(wrap)))


class _Builder:
    """Adds stages to a model and runs each on the batch: so shapes are known, and no stage is out of proportion."""

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype) -> None:
        self.draw, self.dtype, self.generator = draw, dtype, generator_of(draw(seeds))
        self.stages: list[list[Tensor]] = []
        self.matrices: list[int] = []
        self.steps: list[tuple[Operation, int | None]] = []
        self.x = torch.empty(0)
        self.table: int | None = None

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def start(self) -> Tensor:
        """Return inputs; add an embedding if these are tokens."""
        n = self.draw(st.integers(1, 4))
        shape: tuple[int, ...] = self.draw(st.sampled_from([(3,), (2, 3), (2, 5), (2, 4, 5), (2, 2, 3, 3), ()]))
        if shape:
            self.x = self.normal(n, *shape)
            return self.x
        size, d = self.draw(st.integers(2, 6)), self.draw(st.integers(1, 4))
        tokens = torch.randint(size, (n, 3), generator=self.generator)
        padding = self.draw(st.sampled_from([None, 0]))
        self.x = tokens
        self.add(lambda p, x: F.embedding(x, p[0], padding), self.normal(size, d))
        self.table = 0
        return tokens

    def add(self, operation: Operation, *params: Tensor, product: bool = True) -> None:
        """Add an operation with its parameters, if there are any."""
        source = len(self.stages) if params else None
        if params:
            self.stages.append(list(params))
            if product:
                self.matrices.append(len(self.stages) - 1)
        self.apply(operation, source)

    def apply(self, operation: Operation, source: int | None) -> None:
        self.steps.append((operation, source))
        self.x = operation(self.stages[source] if source is not None else [], self.x)

    def stage(self) -> None:
        """Add a layer, used once or twice, perhaps with a residual connection."""
        image = self.x.ndim > 3 or (self.x.ndim == 3 and self.table is None and self.draw(st.booleans()))
        kinds = [self.convolution, self.transposed_convolution] if image else [self.linear, self.linear]
        make = self.draw(st.sampled_from([*kinds, self.normalisation, self.scale_or_shift]))
        before = self.x
        operation, *params = make(image)
        activation = self.draw(st.sampled_from(ACTIVATIONS))
        plain = lambda p, x: activation(operation(p, x))  # noqa: E731
        fits = plain(params, before).shape == before.shape
        whole = plain
        if fits and self.draw(st.booleans()):
            whole = lambda p, x: x + plain(p, x)  # noqa: E731
        self.add(whole, *params, product=make in kinds)
        if fits and self.draw(st.booleans()):
            self.apply(whole, len(self.stages) - 1)

    def finish(self) -> Tensor:
        """Return the outputs: by the embedding's table, or by a linear layer."""
        if self.x.ndim > 3 or (self.x.ndim == 3 and self.draw(st.booleans())):
            reduce = self.draw(st.sampled_from(["flatten", "mean"]))
            self.add(lambda p, x: x.flatten(1) if reduce == "flatten" else x.flatten(2).mean(-1))
        table = None if self.table is None else self.stages[self.table][0]
        if table is not None and self.draw(st.booleans()):
            weight = self.normal(table.shape[1], self.x.shape[-1])
            self.add(lambda p, x: torch.tanh(F.linear(x, *p)), weight)
            self.apply(lambda p, x: F.linear(x, p[0]), self.table)
        else:
            operation, *params = self.linear(False)
            self.add(operation, *params)
        return self.x

    def linear(self, image: bool) -> tuple[Any, ...]:
        """Draw a linear layer in one of its spellings: operation and parameters."""
        d = self.x.shape[-1]
        k = self.draw(st.sampled_from([min(d, 6), 1, 2, 4]))
        bias = [self.normal(k)] if self.draw(st.booleans()) else []
        spelling = self.draw(st.sampled_from(["linear", "x @ w", "einsum", "x @ w.T", "reshaped", "w @ x"]))
        forward, turned = self.normal(k, d) / d**0.5, self.normal(d, k) / d**0.5
        made: dict[str, tuple[Operation, Tensor]] = {
            "linear": (lambda p, x: F.linear(x, *p), forward),
            "x @ w": (lambda p, x: _plus(x @ p[0], p), turned),
            "einsum": (lambda p, x: _plus(torch.einsum("...d,dk->...k", x, p[0]), p), turned),
            "x @ w.T": (lambda p, x: _plus(torch.matmul(x, p[0].T), p), forward),
            "reshaped": (lambda p, x: F.linear(x, p[0].view(k, d), *p[1:]), forward.reshape(-1)),
            "w @ x": (lambda p, x: _plus((p[0] @ x.unsqueeze(-1)).squeeze(-1), p), forward),
        }
        operation, weight = made[spelling]
        return operation, weight, *bias

    def convolution(self, image: bool) -> tuple[Any, ...]:
        """Draw a convolution with any settings that fit."""
        sizes, channels = self.x.shape[2:], self.x.shape[1]
        groups = self.draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        kernel = [self.draw(st.integers(1, min(3, size))) for size in sizes]
        settings: dict[str, Any] = {"groups": groups, "padding": self.draw(st.sampled_from([0, 1, "same"]))}
        if settings["padding"] != "same":
            settings["stride"] = tuple([self.draw(st.integers(1, 2)) for _ in sizes])
        if all(2 * (k - 1) < size for k, size in zip(kernel, sizes, strict=True)):
            settings["dilation"] = self.draw(st.integers(1, 2))
        channels_out = groups * self.draw(st.sampled_from([1, 2, channels // groups]))
        weight = self.normal(channels_out, channels // groups, *kernel)
        bias = [self.normal(channels_out)] if self.draw(st.booleans()) else []
        function = CONVOLUTIONS[len(sizes)]
        scale = math.prod(weight.shape[1:]) ** -0.5
        return lambda p, x: function(x, *p, **settings), weight * scale, *bias

    def transposed_convolution(self, image: bool) -> tuple[Any, ...]:
        """Draw a transposed convolution."""
        axes, channels = self.x.ndim - 2, self.x.shape[1]
        groups = self.draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
        stride = self.draw(st.integers(1, 2)) if max(self.x.shape[2:]) < 6 else 1
        settings: dict[str, Any] = {"groups": groups, "stride": stride, "output_padding": stride - 1}
        out = self.draw(st.sampled_from([1, 2]))
        weight = self.normal(channels, out, *[self.draw(st.integers(1, 2)) for _ in range(axes)])
        bias = [self.normal(groups * out)] if self.draw(st.booleans()) else []
        function = TRANSPOSED[axes]
        return lambda p, x: function(x, *p, **settings), weight / channels**0.5, *bias

    def normalisation(self, image: bool) -> tuple[Any, ...]:
        """Draw a layer, group or root-mean-square normalisation with a scale and perhaps a shift."""
        d = self.x.shape[1] if image else self.x.shape[-1]
        weight, bias = 1 + self.normal(d) / 4, [self.normal(d)] if self.draw(st.booleans()) else []
        if image:
            if math.prod(self.x.shape[1:]) == 1:  # torch refuses to normalise a single number
                return self.scale_or_shift(image)
            groups = self.draw(st.sampled_from([1, d] if math.prod(self.x.shape[2:]) > 1 else [1]))
            return lambda p, x: F.group_norm(x, groups, *p), weight, *bias
        if self.draw(st.booleans()):
            return lambda p, x: F.rms_norm(x, (d,), p[0]), weight
        return lambda p, x: F.layer_norm(x, (d,), *p), weight, *bias

    def scale_or_shift(self, image: bool) -> tuple[Any, ...]:
        """Draw a parameter that is multiplied or added."""
        shape = (self.x.shape[1], *[1] * (self.x.ndim - 2)) if image else (self.x.shape[-1],)
        multiplied = self.draw(st.booleans())
        return lambda p, x: x * p[0] if multiplied else x + p[0], 1 + self.normal(*shape) / 2

    def places(self, wrap: Callable[[list[list[Any]]], Tree]) -> list[int]:
        """Return the places of the weights of products among the leaves."""
        named = [[f"{i}.{j}" for j in range(len(stage))] for i, stage in enumerate(self.stages)]
        leaves = optree.tree_leaves(wrap(named))
        return [leaves.index(f"{i}.0") for i in self.matrices]


def _plus(product: Tensor, params: list[Tensor]) -> Tensor:
    return product + params[1] if len(params) > 1 else product


def _flat(stages: list[list[Any]]) -> Tree:
    names = ("weight", "bias")
    return {f"{i}.{name}": p for i, stage in enumerate(stages) for name, p in zip(names, stage, strict=False)}


FORMS: list[tuple[Callable[[list[list[Any]]], Tree], Callable[[Tree, int], list[Tensor]]]] = [
    (_flat, lambda params, i: [params[f"{i}.{name}"] for name in ("weight", "bias") if f"{i}.{name}" in params]),
    (
        lambda stages: {"net": {f"layer{i}": dict(zip("wb", stage, strict=False)) for i, stage in enumerate(stages)}},
        lambda params, i: [params["net"][f"layer{i}"][name] for name in "wb" if name in params["net"][f"layer{i}"]],
    ),
    (lambda stages: [list(stage) for stage in stages], lambda params, i: list(params[i])),
    (lambda stages: ({"layers": tuple(map(tuple, stages))},), lambda params, i: list(params[0]["layers"][i])),
    (lambda stages: [Affine(*s) if len(s) == 2 else Linear(*s) for s in stages], lambda params, i: list(params[i])),
]
"""The forms of parameter trees: one function makes the tree of all stages, one reads a stage from it."""
