"""The treatment *reduce* of shared weights: factors of one row for each example.

It is exact where the gradients of an example are the same at all positions, so that
``Σ_t g a_tᵀ = (Σ_t g) (mean a_t)ᵀ``, and the product of two factors is the block.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.func import jacrev

import lrkfac
from lrkfac import evaluator, find_layers, precondition_by_fisher
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.blocks import initial_state
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.core.layers.matrix import layer_matrix, split_groups
from lrkfac.structures import dense, kronecker
from lrkfac.testing import layers
from tests import reference
from tests.core.curvature.test_covariances import close, input_rows, is_the_matrix, largest, normal, output_rows
from tests.core.curvature.test_ekfac import refreshed

REDUCE = kronecker(dense(), dense(), treatment="reduce")
EXPAND = kronecker(dense(), dense())


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
    a = torch.cat(
        [input_rows(layer, x, o).unflatten(1, (n, -1)) for x, o in zip(inputs, layer.options, strict=True)], 2
    )
    g = torch.cat([output_rows(layer, g[0]).unflatten(1, (n, -1)) for g in gradients], 2)
    A, B = reference.second_moment(a.mean(2)), 5 * 0.3 * n * reference.second_moment(g.sum(2))
    for i, found in enumerate(of_groups(layer, inputs, gradients, scale)):
        is_the_matrix(found.input, A[i])
        close(found.output.dense(), B[i], size=scale * g.norm() ** 2)


def evaluation(model, params, inputs, targets, likelihood="gaussian", case=None):
    options = case.likelihood_options if case else {}
    described = find_layers(model, params, inputs, strict=True) if case is None else find_layers(model, params, inputs)
    likelihood = getattr(lrkfac, likelihood)(**options)
    return described, evaluator(model, likelihood, described, "exact")(params, inputs, targets)


# One example, and outputs that depend on the layer's outputs through their sum alone ------------------


def head(s):
    """[N, ..., 3] to [N, 2]."""
    return torch.stack([s.flatten(1, -2).sum(1).tanh().prod(1), s.flatten(1, -2).sum(1).sin().sum(1)], 1)


def channels_last(convolution, **options):
    def model(params, x):
        return head(convolution(x, params["w"], params["b"], **options).movedim(1, -1))

    return model


def twice(params, x):
    return head(torch.stack([F.linear(x, params["w"], params["b"]), F.linear(x.sin(), params["w"], params["b"])], 1))


def embedded(params, tokens):
    return head(F.embedding(tokens, params["w"], padding_idx=0))


MODELS = {
    "sequence": (lambda p, x: head(F.linear(x, p["w"], p["b"])), (3, 4), (1, 5, 4)),
    "two axes": (lambda p, x: head(F.linear(x, p["w"], p["b"])), (3, 4), (1, 5, 2, 4)),
    "two uses": (twice, (3, 4), (1, 4)),
    "conv1d": (channels_last(F.conv1d, stride=2, padding=1), (3, 2, 3), (1, 2, 7)),
    "conv2d same": (channels_last(F.conv2d, padding="same", dilation=(1, 2)), (3, 2, 2, 3), (1, 2, 4, 5)),
    "conv3d": (channels_last(F.conv3d, padding=1), (3, 2, 2, 1, 2), (1, 2, 3, 2, 3)),
    "conv_transpose1d": (channels_last(F.conv_transpose1d, stride=2), (2, 3, 3), (1, 2, 4)),
    "conv_transpose2d": (channels_last(F.conv_transpose2d, padding=1, stride=2), (2, 3, 2, 3), (1, 2, 3, 4)),
    "conv_transpose3d": (channels_last(F.conv_transpose3d), (2, 3, 1, 2, 2), (1, 2, 2, 2, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_example_with_equal_gradients_at_all_positions_is_exact(name):
    model, shape, size = MODELS[name]
    params, inputs, targets = {"w": normal(*shape), "b": normal(3, seed=1)}, normal(*size, seed=2), normal(1, 2)
    check_block(model, params, inputs, targets)
    expand = block_of(model, params, inputs, targets, EXPAND)
    exact = explicit_block(model, params, inputs)[1]
    assert (expand - exact).norm() > 1e-3 * exact.norm()


def test_embedding_of_one_example_is_exact():
    """Its factor for the numbers is that of their histogram, without the padding's."""
    tokens, params, targets = torch.tensor([[3, 0, 3, 1]]), {"w": normal(6, 3)}, normal(1, 2)
    (layer,), e = evaluation(embedded, params, tokens, targets)
    both = kronecker_factors(
        layer, e.statistics.inputs["w"], e.statistics.output_gradients["w"], e.statistics.scale, "reduce"
    )
    histogram = torch.tensor([0, 1, 0, 2, 0, 0]).double() / 4
    is_the_matrix(both.output, histogram[:, None] * histogram)
    inputs = tokens.clone()
    inputs[inputs == 0] = 5  # of the padding's gradient, which is not in the block, the product knows nothing
    unpadded = lambda p, x: head(F.embedding(x, p["w"]))  # noqa: E731
    (layer,), e = evaluation(unpadded, params, inputs, targets)
    both = kronecker_factors(
        layer, e.statistics.inputs["w"], e.statistics.output_gradients["w"], e.statistics.scale, "reduce"
    )
    close(torch.kron(both.output.dense(), both.input.dense()), explicit_block(unpadded, params, inputs)[1])


def explicit_block(model, params, inputs):
    """The described layer, and ``JᵀJ / n`` in the order of its matrix: squared loss."""
    (layer,) = found = find_layers(model, params, inputs, strict=True)
    jacobian = jacrev(lambda p: model(p, inputs))(params)
    names = [p.path for p in found.parameters]
    rows = torch.func.vmap(torch.func.vmap(lambda j: layer_matrix(layer, [j[name] for name in names]).joined()))(
        jacobian
    )
    J = rows.flatten(0, 1).flatten(1)
    return layer, J.mT @ J / len(inputs)


def block_of(model, params, inputs, targets, structure):
    described, e = evaluation(model, params, inputs, targets)
    (block,) = blocks(described, structure, None)
    start = initial_state(block, [params[p.path] for p in described.parameters])
    state = refreshed(block, start, e.statistics, 0.9).average
    return block.structure.operator(state).to_dense()


def check_block(model, params, inputs, targets):
    close(block_of(model, params, inputs, targets, REDUCE), explicit_block(model, params, inputs)[1])


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


# Structures -------------------------------------------------------------------------------------------


def test_embedding_needs_no_square_of_its_vocabulary():
    tokens, params = torch.randint(2000, (5, 6)), {"w": normal(2000, 3)}
    described, e = evaluation(lambda p, x: head(F.embedding(x, p["w"])), params, tokens, normal(5, 2))
    tx = precondition_by_fisher(described, REDUCE)
    assert largest(lambda: tx.update(e.grads, tx.init(params), params, evaluation=e)) <= 20 * 2000 * 3


def test_convolution_is_touched_without_unfolding():
    x, params = normal(4, 16, 20, 20), {"w": normal(8, 16, 3, 3), "b": normal(8)}
    (layer,) = find_layers(lambda p, x: F.conv2d(x, p["w"], p["b"], padding=1), params, x)
    gradients = (normal(1, 4, 8, 20, 20),)
    assert largest(lambda: kronecker_factors(layer, (x,), gradients, torch.tensor(1.0), "reduce")) <= x.numel()
