"""Small float64 networks, drawn from seeds, for the tests: pure functions of flat parameter dictionaries.

A network is a tuple of stages, run one after another like ``nn.Sequential``: a ``LayerSpec`` (a layer with
weight ``"<position>.weight"`` and, unless ``bias=False``, ``"<position>.bias"``), a ``Shift`` (subtracts
the parameter ``"<position>.shift"``, which belongs to no layer) or a plain function of the activations. A layer's
name is its position.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class LayerSpec(NamedTuple):
    """A ``linear`` or ``conv2d`` call; ``options`` are the keywords of ``conv2d`` (stride, padding, ...)."""

    kind: str
    weight_shape: tuple[int, ...]
    bias: bool = True
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)


class Shift(NamedTuple):
    """Subtracts a parameter of the given shape: one that no layer covers, where one that is added would be."""

    shape: tuple[int, ...]


Stage = LayerSpec | Shift | Callable[[Tensor], Tensor]
Params = dict[str, Tensor]


class Case(NamedTuple):
    """One network, its batch and its likelihood: "categorical" (classes are the last axis of the outputs, the others
    count terms), "gaussian" (``likelihood_options``: ``variance``) or "bernoulli" (both sum over all axes but one).
    """

    name: str
    model: Callable[[Params, Tensor], Tensor]
    params: Params
    inputs: Tensor
    targets: Tensor
    likelihood: str
    likelihood_options: dict[str, float]
    stages: tuple[Stage, ...]

    @property
    def layers(self) -> dict[str, LayerSpec]:
        """The layers by name, in the order in which they are called."""
        return {str(i): stage for i, stage in enumerate(self.stages) if isinstance(stage, LayerSpec)}


def apply_stage(stage: Stage, name: str, params: Params, x: Tensor) -> Tensor:
    if isinstance(stage, Shift):
        return x - params[f"{name}.shift"]
    if not isinstance(stage, LayerSpec):
        return stage(x)
    operation = {"linear": functional.linear, "conv2d": functional.conv2d}[stage.kind]
    return operation(x, params[f"{name}.weight"], params.get(f"{name}.bias"), **stage.options)


def apply_stages(stages: tuple[Stage, ...], params: Params, inputs: Tensor) -> Tensor:
    """The outputs of the network; with ``stages`` bound it is the pure function ``model(params, inputs)``."""
    for position, stage in enumerate(stages):
        inputs = apply_stage(stage, str(position), params, inputs)
    return inputs


def make_case(
    name: str,
    stages: tuple[Stage, ...],
    input_shape: tuple[int, ...],
    likelihood: str = "categorical",
    seed: int = 0,
    **likelihood_options: float,
) -> Case:
    """Draws parameters (normal, variance 1 / fan-in), inputs (normal) and targets that fit the likelihood."""
    generator, params = torch.Generator().manual_seed(seed), {}
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    for position, stage in enumerate(stages):
        if isinstance(stage, LayerSpec):
            shape = stage.weight_shape
            params[f"{position}.weight"] = normal(shape) / torch.Size(shape[1:]).numel() ** 0.5
            if stage.bias:
                params[f"{position}.bias"] = 0.5 * normal(shape[:1])
        elif isinstance(stage, Shift):
            params[f"{position}.shift"] = normal(stage.shape)
    model, inputs = partial(apply_stages, stages), normal(input_shape)
    outputs = model(params, inputs)
    if likelihood == "categorical":
        targets = torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator)
    elif likelihood == "bernoulli":
        targets = torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
    else:
        targets = normal(outputs.shape)
    return Case(name, model, params, inputs, targets, likelihood, likelihood_options, stages)


def linear(d_in: int, d_out: int, bias: bool = True) -> LayerSpec:
    return LayerSpec("linear", (d_out, d_in), bias)


def conv2d(channels_in: int, channels_out: int, kernel: tuple[int, int], bias: bool = True, **options) -> LayerSpec:
    return LayerSpec("conv2d", (channels_out, channels_in // options.get("groups", 1), *kernel), bias, options)


tanh = torch.tanh
flatten = partial(torch.flatten, start_dim=1)
scalar = partial(torch.squeeze, dim=-1)
global_average = partial(torch.mean, dim=(2, 3))
position_average = partial(torch.mean, dim=1)
# [N, T, F] to itself: position t holds the sum up to t, so that terms of one example share positions.
causal_sum = partial(torch.cumsum, dim=1)


def with_tanh(*layers: LayerSpec) -> tuple[Stage, ...]:
    return tuple(stage for layer in layers for stage in (layer, tanh))


# K-FAC (exact estimator) equals the block of the Gauss-Newton matrix: linear networks with squared loss (the
# Jacobians of the outputs are the same for all rows), and networks without weight sharing on one example.
PARTLY_BIASED = linear(4, 5), linear(5, 3, bias=False), linear(3, 2)
EXACT = (
    make_case("deep_linear", (linear(4, 5), linear(5, 3), linear(3, 2)), (6, 4), "gaussian", 1, variance=1.0),
    make_case("deep_linear_partly_biased", PARTLY_BIASED, (6, 4), "gaussian", seed=2, variance=0.25),
    # linear 3 -> 4 -> 2 on sequences [4, 3, 3], outputs [4, 3, 2]: four likelihood terms of three rows each
    make_case("deep_linear_sequence", (linear(3, 4), linear(4, 2)), (4, 3, 3), "gaussian", 3, variance=1.0),
    make_case("single_datum_categorical", (linear(4, 5), tanh, linear(5, 3)), (1, 4), "categorical", 4),
    make_case("single_datum_bernoulli", (linear(4, 5), tanh, linear(5, 3)), (1, 4), "bernoulli", 5),
)

LINEAR = (
    make_case("tanh_categorical", (linear(5, 6), tanh, linear(6, 4), tanh, linear(4, 3)), (7, 5), "categorical", 10),
    make_case("tanh_gaussian", (linear(5, 6), tanh, linear(6, 3)), (7, 5), "gaussian", 11, variance=0.25),
    make_case("tanh_bernoulli", (linear(5, 6), tanh, linear(6, 3)), (7, 5), "bernoulli", 12),
    make_case("no_bias", (linear(5, 6, bias=False), tanh, linear(6, 3, bias=False)), (7, 5), seed=13),
    make_case("width_one", (linear(3, 1), tanh, linear(1, 2)), (5, 3), seed=14),
    make_case("scalar_output", (linear(3, 4), tanh, linear(4, 1), scalar), (5, 3), "gaussian", 16, variance=1.0),
    # the parameter "1.shift" belongs to no layer
    make_case("uncovered_shift", (linear(4, 5), Shift((5,)), tanh, linear(5, 3)), (6, 4), seed=15),
)

AVERAGED = linear(5, 6), tanh, linear(6, 4), position_average, linear(4, 3)
SEQUENCE = (
    # inputs [4, 3, 5]; averaged over the three positions: one likelihood term an example, three rows each
    make_case("sequence_averaged", AVERAGED, (4, 3, 5), seed=20),
    # outputs [4, 3, 3]: one term a position, depending on that position alone
    make_case("sequence_of_terms", (linear(5, 6), tanh, linear(6, 3)), (4, 3, 5), seed=21),
    # outputs [4, 3, 3]: one term a position, depending on that position and all earlier ones
    make_case("sequence_of_coupled_terms", (linear(5, 4), tanh, causal_sum, linear(4, 3)), (4, 3, 5), seed=22),
)

STRIDED = conv2d(2, 3, (3, 3), stride=2, padding=1)
VALID = conv2d(2, 3, (3, 3), padding="valid")
SAME = conv2d(2, 3, (2, 4), padding="same"), conv2d(3, 2, (3, 2), bias=False, padding="same", dilation=(1, 2))
DILATED = conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), conv2d(3, 2, (2, 2), dilation=2)
GROUPED = conv2d(4, 6, (3, 3), padding=1, groups=2), conv2d(6, 2, (2, 2), bias=False, stride=2, groups=2)
DEPTHWISE = conv2d(3, 6, (3, 3), padding="same", groups=3), conv2d(6, 3, (1, 1))
CONVOLUTION = (
    # [5, 2, 6, 6] -> [5, 3, 3, 3]; then a linear layer on the flattened image
    make_case("conv_stride", (*with_tanh(STRIDED), flatten, linear(27, 3)), (5, 2, 6, 6), seed=30),
    # one more zero after than before; then none at all
    make_case("conv_same_even", (*with_tanh(*SAME, VALID), global_average), (3, 2, 5, 4), seed=31),
    # every option a pair, to [3, 3, 3, 6]
    make_case("conv_dilation", (*with_tanh(*DILATED), flatten), (3, 2, 5, 6), "gaussian", seed=32, variance=0.5),
    make_case("conv_groups", (*with_tanh(*GROUPED), flatten, linear(8, 2)), (4, 4, 4, 4), "bernoulli", seed=33),
    # channel multiplier 2 (weight [6, 1, 3, 3]), then pointwise 1x1
    make_case("conv_depthwise", (*with_tanh(*DEPTHWISE), global_average), (4, 3, 4, 4), seed=34),
)

ALL = EXACT + LINEAR + SEQUENCE + CONVOLUTION
