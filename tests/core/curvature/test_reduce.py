"""The treatment *reduce* of shared weights: factors of one row for each example.

It is exact where the gradients of an example are the same at all positions, so that
``Σ_t g a_tᵀ = (Σ_t g) (mean a_t)ᵀ``, and the product of two factors is the block.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.func import jacrev, vmap

import lrkfac
from lrkfac import evaluator, find_layers, precondition_by_fisher
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.core.layers.matrix import layer_matrix, split_groups
from lrkfac.structures import dense, kronecker
from lrkfac.testing import layers
from tests import reference
from tests.core.curvature.test_covariances import close, input_rows, is_the_matrix, largest, normal, output_rows


def of_groups(layer, inputs, gradients, scale, treatment="reduce"):
    inputs, gradients = split_groups(layer, inputs), split_groups(layer, gradients)
    if layer.groups == 1:
        return [kronecker_factors(layer, inputs, gradients, scale, treatment)]
    groups = range(layer.groups)
    parts = [(tuple(a[i] for a in inputs), tuple(g[i] for g in gradients)) for i in groups]
    return [kronecker_factors(layer, a, g, scale, treatment) for a, g in parts]


@given(layers())
def test_factors_are_those_of_summed_gradients_and_mean_inputs(case):
    """Samples are rows; uses of one weight are positions."""
    layer, n, scale = case.layer, len(case.inputs), torch.tensor(0.3, dtype=torch.float64)
    layer = replace(layer, kinds=layer.kinds * 2, options=layer.options * 2)
    inputs = (case.inputs, case.inputs.flip(-1))
    gradients = tuple(torch.stack([g, 2 * g]) for g in (case.output_gradients, case.output_gradients.square()))
    a = torch.cat([input_rows(layer, x, layer.options[0]).unflatten(1, (n, -1)) for x in inputs], 2)
    g = torch.cat([output_rows(layer, g[0]).unflatten(1, (n, -1)) for g in gradients], 2)
    A, B = reference.second_moment(a.mean(2)), 5 * 0.3 * n * reference.second_moment(g.sum(2))
    for i, found in enumerate(of_groups(layer, inputs, gradients, scale)):
        is_the_matrix(found.input, A[i])
        close(found.output.dense(), B[i], size=scale * g.norm() ** 2)


def explicit_block(model, params, inputs):
    """``JᵀJ / n`` in the order of the layer's matrix: squared loss."""
    (layer,) = layers = find_layers(model, params, inputs, strict=True)
    jacobian = jacrev(lambda p: model(p, inputs))(params)
    joined = lambda j: layer_matrix(layer, [j[p.path] for p in layers.parameters]).joined()  # noqa: E731
    J = vmap(vmap(joined))(jacobian).flatten(0, 1).flatten(1)
    return J.mT @ J / len(inputs)


def reduced_factors(model, params, inputs, targets):
    (layer,) = layers = find_layers(model, params, inputs, strict=True)
    statistics = evaluator(model, lrkfac.gaussian(), layers, "exact")(params, inputs, targets).statistics
    of_layer = statistics.inputs[layer.name], statistics.output_gradients[layer.name], statistics.scale
    return kronecker_factors(layer, *of_layer, "reduce")


def check_block(model, params, inputs, targets):
    factors = reduced_factors(model, params, inputs, targets)
    close(torch.kron(factors.output.dense(), factors.input.dense()), explicit_block(model, params, inputs))


# One example, and outputs that depend on the layer's outputs through their sum alone ------------------


def head(s):
    """[N, ..., 3] to [N, 2]."""
    return torch.stack([s.flatten(1, -2).sum(1).tanh().prod(1), s.flatten(1, -2).sum(1).sin().sum(1)], 1)


def test_one_example_with_equal_gradients_at_all_positions_is_exact():
    """Two uses of a linear layer; an embedding, whose factor for the numbers is that of their histogram."""
    twice = lambda p, x: head(torch.stack([F.linear(y, p["w"], p["b"]) for y in (x, x.sin())], 1))  # noqa: E731
    check_block(twice, {"w": normal(3, 4), "b": normal(3, seed=1)}, normal(1, 4, seed=2), normal(1, 2))
    tokens, params = torch.tensor([[3, 0, 3, 1]]), {"w": normal(6, 3)}
    check_block(lambda p, x: head(F.embedding(x, p["w"])), params, tokens, normal(1, 2))
    padded = lambda p, x: head(F.embedding(x, p["w"], padding_idx=0))  # noqa: E731
    histogram = torch.tensor([0, 1, 0, 2, 0, 0]).double() / 4
    is_the_matrix(reduced_factors(padded, params, tokens, normal(1, 2)).output, histogram[:, None] * histogram)


@pytest.mark.parametrize("pooled", [torch.mean, torch.sum])
def test_pooling_in_a_linear_network_is_exact(pooled):
    """For any number of examples: each layer of a linear network with squared loss (section 3.3 of the paper)."""
    weights = {"0": normal(4, 3), "1": normal(3, 4, seed=1), "2": normal(2, 3, seed=2)}
    inputs, targets = normal(6, 5, 3), normal(6, 2)
    for name in weights:
        others = {k: w for k, w in weights.items() if k != name}

        def model(params, x, others=others):
            both = {**others, **params}
            x = pooled(F.linear(F.linear(x, both["0"]), both["1"]), dim=1)
            return F.linear(x, both["2"])

        check_block(model, {name: weights[name]}, inputs, targets)


def test_embedding_needs_no_square_of_its_vocabulary():
    tokens, params = torch.randint(2000, (5, 6)), {"w": normal(2000, 3)}
    model = lambda p, x: head(F.embedding(x, p["w"]))  # noqa: E731
    described = find_layers(model, params, tokens)
    e = evaluator(model, lrkfac.gaussian(), described, "exact")(params, tokens, normal(5, 2))
    tx = precondition_by_fisher(described, kronecker(dense(), dense(), treatment="reduce"))
    assert largest(lambda: tx.update(e.grads, tx.init(params), params, evaluation=e)) <= 20 * 2000 * 3


def test_convolution_is_touched_without_unfolding():
    x, params = normal(4, 16, 20, 20), {"w": normal(8, 16, 3, 3), "b": normal(8)}
    (layer,) = find_layers(lambda p, x: F.conv2d(x, p["w"], p["b"], padding=1), params, x)
    gradients = (normal(1, 4, 8, 20, 20),)
    assert largest(lambda: kronecker_factors(layer, (x,), gradients, torch.tensor(1.0), "reduce")) <= x.numel()
