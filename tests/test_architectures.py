"""Laws that hold for every model: drawn at random, of every layer kind, spelling and parameter tree."""

from dataclasses import replace

import optree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad

from lrkfac import evaluator, find_layers
from lrkfac.testing import architectures

estimators = st.sampled_from(["mc", "exact", "empirical"])


def close(found, expected, tolerance):
    """Relative to the largest entry of all leaves: some are nothing but rounding."""
    found, expected = optree.tree_leaves(found), optree.tree_leaves(expected)
    scale = max(e.abs().max() for e in expected) + 1e-3
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        assert (f - e).abs().max() <= tolerance * scale


@settings(max_examples=25)
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


@settings(max_examples=25)
@given(architectures(dtype=torch.float64))
def test_every_weight_matrix_is_covered(case):
    layers = find_layers(case.model, case.params, case.inputs)
    assert layers.covered.issuperset(case.weights), str(layers)
    longer = torch.cat([case.inputs, case.inputs, case.inputs])
    described = [replace(x, independent=None) for x in (layers, find_layers(case.model, case.params, longer))]
    assert described[0] == described[1], "the batch is not part of the description"  # nor need it show dependence
