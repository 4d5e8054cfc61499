"""The ready-made chains are the chains that their documentation says."""

import optree
import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import kfac, low_rank_kfac
from lrkfac.structures import kronecker, low_rank, low_rank_plus_diagonal
from tests import cases
from tests.test_training_step import RATE, chained
from tests.transforms.test_base import trained
from tests.transforms.test_precondition import DENSE, layers_and_evaluate

MLP, SHIFT, GROUPS = cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[3]
some_cases = pytest.mark.parametrize("case", [SHIFT, GROUPS], ids=lambda case: case.name)
OPTIONS = {"damping": 0.05, "decay": 0.7, "momentum": 0.8, "weight_decay": 0.02, "kl_clip": 5e-3}
DEFAULTS = {"damping": 0.03, "decay": 0.95, "momentum": 0.9, "weight_decay": 0.0, "kl_clip": 1e-3}


def same(case, expected, *transformations):
    """The same parameters after each step, bit for bit."""
    evaluate = layers_and_evaluate(case)[1]
    path, *others = [
        [step.params for step in trained(tx, case.params, evaluate, 4)] for tx in (expected, *transformations)
    ]
    assert all(optree.tree_all(optree.tree_map(torch.equal, other, path)) for other in others)


@some_cases
@pytest.mark.parametrize("rate", [0.2, torch.tensor(0.2).double(), RATE], ids=["number", "tensor", "schedule"])
def test_each_argument_goes_where_it_belongs(case, rate):
    layers, _ = layers_and_evaluate(case)
    two, default = (kronecker(low_rank(r), low_rank_plus_diagonal(r)) for r in (2, 32))
    by_position = low_rank_kfac(layers, rate, 2, *OPTIONS.values())
    same(case, chained(layers, two, rate, **OPTIONS), low_rank_kfac(layers, rate, rank=2, **OPTIONS), by_position)
    same(case, chained(layers, default, rate, **DEFAULTS), low_rank_kfac(layers, rate))
    by_position = kfac(layers, rate, *OPTIONS.values())
    same(case, chained(layers, DENSE, rate, **OPTIONS), kfac(layers, rate, **OPTIONS), by_position)
    same(case, chained(layers, DENSE, rate, **DEFAULTS), kfac(layers, rate))


@some_cases
@pytest.mark.parametrize("gradient_decay", [None, 0.0, 0.9])
def test_the_adaptive_chain(case, gradient_decay):
    """Sums of gradients are preconditioned, by default as far back as the noise says; at 0, each batch's own."""
    layers, _ = layers_and_evaluate(case)
    both = kronecker(low_rank(2, weight=2.0), low_rank_plus_diagonal(2, weight=0.5))
    preconditioner = lrkfac.precondition_by_fisher(layers, both, decay=0.7)
    if gradient_decay:
        preconditioner = lrkfac.chain(lrkfac.trace(gradient_decay), preconditioner)
    found = {"gradient_decay": None} if gradient_decay is None else {}
    by_hand = lrkfac.chain(lrkfac.scale_by_quadratic_model(preconditioner, 0.2, 0.01, **found))
    options = {} if gradient_decay is None else {"gradient_decay": gradient_decay}
    same(case, by_hand, lrkfac.adaptive_low_rank_kfac(layers, 2, 0.2, 0.7, 0.01, **options, dense_up_to=0))


def test_narrow_factors_are_dense_in_the_adaptive_chain():
    """Up to 128 inputs and a bias, unless ranks come from a budget."""
    params = {"w": torch.ones(130, 128), "b": torch.ones(130), "v": torch.ones(129, 130)}
    model = lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"])  # noqa: E731
    layers = lrkfac.find_layers(model, params, torch.ones(2, 128))
    for options, expected in {
        (): ("low", "dense", "dense", "low"),
        (("dense_up_to", 130),): ("dense",) * 4,
        (("dense_up_to", 0),): ("low",) * 4,
        (("rank", "auto"),): ("low",) * 4,
    }.items():
        state = lrkfac.adaptive_low_rank_kfac(layers, **dict(options)).init(params)[0].preconditioner
        sides = [side for name in ("w", "v") for side in state.factors[name]]
        assert [type(side).__name__.startswith("Low") for side in sides] == [kind == "low" for kind in expected]


def test_micro_batches_are_merged_not_accumulated():
    layers, _ = layers_and_evaluate(MLP)
    for inner in (lrkfac.kfac(layers, 0.1), lrkfac.adaptive_low_rank_kfac(layers, rank=2, dense_up_to=0)):
        with pytest.raises(ValueError, match=r"inner: it preconditions.*merge_evaluations"):
            lrkfac.accumulate(inner, 2).init(MLP.params)
