"""Laws that hold for every model: drawn at random, of every layer kind, spelling and parameter tree."""

import optree
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from lrkfac import evaluator, find_layers
from lrkfac.core.curvature.examples import example_gradients
from lrkfac.core.layers.matrix import layer_matrix, split_groups
from lrkfac.testing import architectures, gradients

double = architectures(dtype=torch.float64)
estimators = st.sampled_from(["mc", "exact", "empirical"])


def close(found, expected, tolerance):
    """Relative to the largest entry of all leaves: some are nothing but rounding."""
    found, expected = optree.tree_leaves(found), optree.tree_leaves(expected)
    scale = max(e.abs().max() for e in expected) + 1e-3
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        assert (f - e).abs().max() <= tolerance * scale


@given(architectures(), estimators, st.sampled_from(["joint", "separate"]))
def test_gradients_are_those_of_autograd(case, estimator, bias):
    """``mean of g aᵀ`` is the gradient, layer by layer, and the free parameters' is as it is."""
    layers = find_layers(case.model, case.params, case.inputs, bias=bias)
    expected = grad(lambda p: case.likelihood.loss(case.model(p, case.inputs), case.targets))(case.params)
    evaluate = evaluator(case.model, case.likelihood, layers, estimator)
    tolerance = 1e-10 if optree.tree_leaves(case.params)[0].dtype == torch.float64 else 1e-4
    for statistics in (True, False):
        e = evaluate(case.params, case.inputs, case.targets, statistics=statistics)
        close(e.grads, expected, tolerance)


@given(double)
def test_every_weight_matrix_is_covered(case):
    layers = find_layers(case.model, case.params, case.inputs)
    assert layers.covered.issuperset(case.weights), str(layers)
    longer = torch.cat([case.inputs, case.inputs, case.inputs])
    assert find_layers(case.model, case.params, longer) == layers, "the batch is not part of the description"


@given(double, st.integers(0, 99))
def test_exact_statistics_make_up_the_fisher_matrix(case, seed):
    """``uᵀ F u`` within each layer, from its examples' gradients, is that of the products of the whole model."""
    layers = find_layers(case.model, case.params, case.inputs)
    e = evaluator(case.model, case.likelihood, layers, "exact")(case.params, case.inputs, case.targets)
    leaves, structure = optree.tree_flatten(gradients(case.params, seed))
    for layer in layers:
        own = [p.index for p in (layer.weight, layer.bias) if p is not None]
        u = [leaf if i in own else torch.zeros_like(leaf) for i, leaf in enumerate(leaves)]

        def along(inputs, rows, matrix, layer=layer):
            return (example_gradients(layer, inputs, rows) * matrix).sum((-2, -1))

        inputs, rows = (split_groups(layer, part[layer.name]) for part in e.statistics[:2])
        matrix = layer_matrix(layer, u).joined()
        z = along(inputs, rows, matrix) if layer.groups == 1 else vmap(along)(inputs, rows, matrix).sum(0)
        tree = optree.tree_unflatten(structure, u)
        expected, product = e.quadratic(tree, tree), optree.tree_leaves(e.product(tree))
        torch.testing.assert_close(e.statistics.scale * z.square().sum(), expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(sum((leaves[i] * product[i]).sum() for i in own), expected)
