"""Evaluations under ``vmap`` and the compiler are those of each member and of eager mode."""

from functools import partial
from operator import itemgetter

import optree
import pytest
import torch
from torch.func import vmap

from tests.compiling import traced
from tests.core.evaluation.test_evaluator import CASE, P, close, each_estimator, layers_and_evaluate, noise_for
from tests.marks import requires_compiler


def results(f, case, noise):
    """Those of an evaluation that are tensors, as a function of the parameters."""
    return lambda p: itemgetter(0, 1, 2, 4)(f(p, case.inputs, case.targets, noise=noise))


@each_estimator
def test_ensemble_under_vmap(estimator):
    f = layers_and_evaluate(CASE, estimator)
    params = optree.tree_map(lambda p: torch.stack([p, p + 0.1]), P)
    run = results(f, CASE, noise_for(CASE) if estimator == "mc" else None)
    result = vmap(run)(params)
    member, alone = (optree.tree_map(lambda x: x[1], tree) for tree in (result, params))
    optree.tree_map(close, member, run(alone))
    same = optree.tree_map(lambda p: torch.stack([p, p]), P)
    drawn = optree.tree_leaves(vmap(results(f, CASE, None), randomness="different")(same)[-1])
    assert all(torch.equal(g[0], g[1]) for g in drawn) == (estimator != "mc")


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator, compiled",
    [pytest.param("mc", partial(torch.compile, fullgraph=True), marks=requires_compiler)]
    + [(estimator, traced) for estimator in ("exact", "empirical", "forward_only")],
)
def test_compiled_the_same_as_eager(estimator, compiled):
    run = results(layers_and_evaluate(CASE, estimator), CASE, noise_for(CASE) if estimator == "mc" else None)
    optree.tree_map(close, compiled(run)(P), run(P))
