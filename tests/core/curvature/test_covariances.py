"""Factors by their action, against the unfolded rows of the reference; gradients as matrices."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import find_layers
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.core.evaluation.gradients import layer_gradients
from lrkfac.core.layers.matrix import LayerMatrix, layer_leaves, layer_matrix, split_groups
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.testing import layers
from tests import reference
from tests.dispatch import LargestTensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, dtype=torch.float64, size=None):
    """With a tolerance relative to the norm, or to the size of what was summed, which may cancel."""
    assert found.shape == expected.shape and found.dtype == dtype
    size = expected.norm() if size is None else size
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * (1e-6 + size)


def is_the_matrix(covariance, expected, dtype=torch.float64):
    """Everything by which a structure knows a factor."""
    assert isinstance(covariance, Covariance)
    vectors = normal(len(expected), 3).to(dtype)
    close(covariance.dense(), expected, dtype)
    close(covariance.matvec(vectors), expected @ vectors.double(), dtype)
    close(covariance.diagonal(), expected.diagonal(), dtype)
    close(covariance.trace(), expected.trace(), dtype)


def input_rows(layer, inputs, options):
    """[groups, R, d] from the reference, for a prepared input, in which uneven padding is done."""
    if layer.kind == "linear":
        return reference.linear_input_rows(inputs, layer.bias is not None)
    _, stride, padding, dilation, groups, *_ = options
    even = [before for before, after in padding] if all(x == y for x, y in padding) else [0, 0]
    bias = layer.bias is not None
    return reference.conv2d_input_rows(inputs, layer.weight.shape, stride, even, dilation, groups, bias)


def output_rows(layer, gradients):
    """[groups, R, d_out] from the reference."""
    if layer.kind == "linear":
        return reference.linear_output_rows(gradients)
    return reference.conv2d_output_rows(gradients, layer.groups)


def input_covariance(layer, inputs):
    """That of one group."""
    return kronecker_factors(layer, inputs, (), torch.ones(())).input


def output_covariance(layer, gradients, scale):
    """That of one group: the factor that needs no input."""
    nothing = tuple(torch.empty(0, dtype=g.dtype) for g in gradients)
    return kronecker_factors(layer, nothing, gradients, scale).output


def of_groups(layer, tensors, covariance):
    """The covariance of each group from what all of them received."""
    parts = split_groups(layer, tensors)
    if layer.groups == 1:
        return [covariance(layer, parts)]
    return [covariance(layer, tuple(part[i] for part in parts)) for i in range(layer.groups)]


@each_dtype
@given(case=layers())
def test_input_covariance_is_that_of_the_rows(dtype, case):
    (options,) = case.layer.options
    expected = reference.second_moment(input_rows(case.layer, case.inputs, options))
    found = of_groups(case.layer, (case.inputs.to(dtype),), input_covariance)
    assert len(found) == case.layer.groups
    for covariance, matrix in zip(found, expected, strict=True):
        is_the_matrix(covariance, matrix, dtype)


@each_dtype
@given(case=layers(), scale=st.floats(0.1, 10))
def test_output_covariance_is_that_of_the_rows(dtype, case, scale):
    """``[k, *output]``: samples are rows too."""
    gradients = torch.stack([case.output_gradients, 2 * case.output_gradients])
    make = lambda layer, g: output_covariance(layer, g, torch.tensor(scale))  # noqa: E731
    rows = output_rows(case.layer, case.output_gradients)
    expected = 5 * torch.tensor(scale).double() * reference.second_moment(rows) * rows.shape[1]
    for covariance, matrix in zip(of_groups(case.layer, (gradients.to(dtype),), make), expected, strict=True):
        is_the_matrix(covariance, matrix, dtype)


@given(layers())
def test_uses_of_one_weight_are_rows_of_one_factor(case):
    """Also with other settings, and thus another number of rows."""
    layer, inputs = case.layer, case.inputs
    (options,) = layer.options
    more = options
    if layer.kind == "conv2d":
        more = (options[0], (1, 1), ((2, 2), (2, 2)), *options[3:])
    layer = replace(layer, options=(options, more), kinds=layer.kinds * 2, sites=layer.sites * 2)
    both = (inputs, torch.cat([inputs, inputs[:1] + 1]))
    rows = [input_rows(layer, x, o) for x, o in zip(both, layer.options, strict=True)]
    expected = reference.second_moment(torch.cat(rows, 1))
    for covariance, matrix in zip(of_groups(layer, both, input_covariance), expected, strict=True):
        is_the_matrix(covariance, matrix)


@given(layers())
def test_half_precision_is_summed_in_float32(case):
    x, g = case.inputs.bfloat16(), case.output_gradients.bfloat16()
    make = lambda layer, g: output_covariance(layer, g, torch.tensor(1.0))  # noqa: E731
    for tensor, covariance in ((x, input_covariance), (g, make)):
        both = (of_groups(case.layer, (tensor.to(dtype),), covariance) for dtype in (torch.bfloat16, torch.float32))
        for half, single in zip(*both, strict=True):
            is_the_matrix(half, single.dense().double(), torch.float32)


def largest(function):
    with LargestTensor() as mode:
        function()
    return mode.numel


def test_convolution_is_touched_without_unfolding():
    """Nothing is larger than the input, where unfolding takes nine times that."""
    x, w, k = normal(4, 16, 20, 20), normal(8, 16, 3, 3), 4
    (layer,) = find_layers(lambda p, x: F.conv2d(x, p["w"], p["b"], padding=1), {"w": w, "b": normal(8)}, x)
    covariance, V = input_covariance(layer, (x,)), normal(layer.d_in, k)
    assert largest(lambda: (covariance.matvec(V), covariance.diagonal())) <= x.numel()
    assert largest(lambda: reference.conv2d_input_factor(x, w.shape, padding=1)) >= 9 * x.numel()


def test_linear_layer_is_touched_without_the_matrix():
    x, d, k = normal(8, 512), 512, 4
    (layer,) = find_layers(lambda p, x: F.linear(x, p["w"], p["b"]), {"w": normal(600, d), "b": normal(600)}, x)
    covariance, V = input_covariance(layer, (x,)), normal(d + 1, k)
    assert largest(lambda: (covariance.matvec(V), covariance.diagonal())) <= 2 * x.numel()
    covariance = output_covariance(layer, (normal(1, 8, 600),), torch.tensor(1.0))
    assert largest(lambda: (covariance.matvec(normal(600, k)), covariance.diagonal(), covariance.trace())) <= 8 * 600


@each_dtype
@given(case=layers())
def test_gradients_are_the_sums_of_g_times_rows(dtype, case):
    layer, (options,) = case.layer, case.layer.options
    a, g = input_rows(layer, case.inputs, options), output_rows(layer, case.output_gradients)
    expected = torch.einsum("grk,grd->gkd", g, a)
    expected = expected[0] if layer.groups == 1 else expected
    gradients = layer_gradients(layer, (case.inputs.to(dtype),), (case.output_gradients.to(dtype),))
    leaves = layer_leaves(layer, LayerMatrix.of(expected, layer.bias is not None))
    assert set(gradients) == set(leaves) and leaves[layer.weight.index].shape == layer.weight.shape
    for index, leaf in leaves.items():
        close(gradients[index], leaf, dtype, size=g.norm() * a.norm())
    assert torch.equal(layer_matrix(layer, [leaves[index] for index in sorted(leaves)]).joined(), expected)


def test_a_tied_weight_is_the_product_of_its_partial_traces():
    """``(Σ tr(Aₖ) Bₖ) ⊗ (Σ tr(Bₖ) Aₖ) / Σ tr(Aₖ) tr(Bₖ)`` over its two kinds of use."""
    params, numbers = {"w": torch.randn(5, 3).double()}, torch.randint(5, (6, 4))
    model = lambda p, x: F.embedding(x, p["w"]).tanh().mean(1) @ p["w"].T  # noqa: E731
    layers = find_layers(model, params, numbers)
    layer = layers["w"]
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, numbers, numbers[:, 0])
    inputs, gradients, scale = (e.statistics[0]["w"], e.statistics[1]["w"], e.statistics.scale)
    apart = []
    for i, kind in enumerate(layer.kinds):
        use = replace(layer, kinds=(kind,), options=(layer.options[i],), sites=(layer.sites[i],))
        factors = kronecker_factors(use, (inputs[i],), (gradients[i],), scale)
        apart.append((factors.output.dense(), factors.input.dense()))
    both = kronecker_factors(layer, inputs, gradients, scale)
    total = sum(b.trace() * a.trace() for b, a in apart)
    expected = torch.kron(sum(a.trace() * b for b, a in apart), sum(b.trace() * a for b, a in apart)) / total
    close(torch.kron(both.output.dense(), both.input.dense()), expected)
