"""Evaluations under ``vmap`` and the compiler are those of each member and of eager mode, of some examples, too."""

from functools import partial
from operator import itemgetter

import optree
import pytest
import torch
from torch.func import vmap

from tests.compiling import traced
from tests.core.evaluation.test_evaluator import CASE, P, X, Y, each_estimator, evaluator_of, noise_for
from tests.marks import requires_compiler
from tests.tensors import close

NUMBERS = torch.tensor([[0, 3], [5, 1]])


def results(estimator, some, drawn=False):
    """Those of an evaluation that are tensors, as a function of the parameters and the examples."""
    f, noise = evaluator_of(CASE, estimator), noise_for(CASE)[:, : 2 if some else len(X)]
    noise = noise if estimator == "mc" and not drawn else None
    return lambda p, i: itemgetter(0, 1, 2, 4)(f(p, X, Y, noise=noise, examples=i))


@each_estimator
@pytest.mark.parametrize("numbers", [NUMBERS, None], ids=["some", "all"])
def test_ensemble_under_vmap(estimator, numbers):
    some = numbers is not None
    run, params = results(estimator, some), optree.tree_map(lambda p: torch.stack([p, p + 0.1]), P)
    result = vmap(run, (0, 0 if some else None))(params, numbers)
    for i in range(2):
        member, alone = (optree.tree_map(lambda x, i=i: x[i], tree) for tree in (result, params))
        close(member, run(alone, numbers[i] if some else None))
    same = optree.tree_map(lambda p: torch.stack([p, p]), P)
    run = vmap(results(estimator, some, drawn=True), (0, None), randomness="different")
    drawn = optree.tree_leaves(run(same, numbers[0] if some else None)[-1])
    assert all(torch.equal(g[0], g[1]) for g in drawn) == (estimator != "mc")


@pytest.mark.slow
@pytest.mark.parametrize("some", [True, False], ids=["some", "all"])
@pytest.mark.parametrize(
    "estimator, compiled",
    [pytest.param("mc", partial(torch.compile, fullgraph=True), marks=requires_compiler)]
    + [(estimator, traced) for estimator in ("exact", "empirical", "forward_only")],
)
def test_compiled_the_same_as_eager(estimator, compiled, some):
    run, numbers = results(estimator, some), NUMBERS[0] if some else None
    close(compiled(run)(P, numbers), run(P, numbers))


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True], ids=["alone", "vmap"])
def test_targets_drawn_in_one_graph(mapped):
    """They are those of eager mode, where torch's generator is in the same state."""
    run, params = results("mc", False, drawn=True), optree.tree_map(lambda p: torch.stack([p, p]), P) if mapped else P
    run = vmap(run, (0, None), randomness="different") if mapped else run

    torch.compiler.reset()  # the limit of compilations counts those of other tests

    def after_seed(function):
        torch.manual_seed(0)
        return function(params, None)

    close(after_seed(traced(run)), after_seed(run))
