"""The curvature of a data set: the plain mean over batches, whatever their sizes."""

from functools import cache

import pytest
import torch

import lrkfac
from lrkfac.curvature import estimate
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, unit_wise
from tests import cases, reference_networks
from tests.tensors import close

MLP, GROUPS = cases.LINEAR[0], cases.CONVOLUTION[3]
DENSE = kronecker(dense(), dense())
BY_NAME = {case.name: case for case in cases.ALL}
STRUCTURES = {"dense": DENSE, "squares": diagonal(), "layer": layer_wise(), "unit": unit_wise(), "full": full()}


@cache
def layers_and_evaluator(name):
    case = BY_NAME[name]
    layers = lrkfac.find_layers(case.model, case.params, case.inputs)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    return layers, lrkfac.evaluator(case.model, likelihood, layers, "exact")


def arguments(case, sizes):
    layers, evaluate = layers_and_evaluator(case.name)
    batches = list(zip(case.inputs.split(sizes), case.targets.split(sizes), strict=True))
    return evaluate, case.params, batches, layers


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_it_is_that_of_all_batches_in_one(structure):
    case, sizes = (GROUPS, [1, 3]) if structure == unit_wise() else (MLP, [4, 1, 2])
    found = estimate(*arguments(case, sizes), structure)
    whole = estimate(*arguments(case, [len(case.inputs)]), structure)
    close(found.to_dense(), whole.to_dense(), rtol=1e-9)


def test_the_whole_matrix_is_the_gauss_newton_matrix():
    found = estimate(*arguments(MLP, [3, 3, 1]), full()).to_dense()
    names = sorted(MLP.params)
    sizes = {name: x.numel() for name, x in MLP.params.items()}
    places = dict(zip(sizes, torch.arange(sum(sizes.values())).split([*sizes.values()]), strict=True))
    order = torch.cat([places[name] for name in names])  # optree sorts the names
    close(found, reference_networks.gauss_newton_matrix(MLP)[order][:, order], rtol=1e-9)


def test_low_rank_factors_keep_the_trace_and_find_eigenpairs_after_some_passes():
    structure = kronecker(low_rank(2), dense())
    once = estimate(*arguments(MLP, [3, 4]), structure)
    found = estimate(*arguments(MLP, [7]), structure, passes=12)
    for name, (A, _) in reference_networks.factors(MLP, "exact").items():
        close(once.blocks[name].input.trace(), A[0].trace(), rtol=1e-9)
        if isinstance(found.blocks[name].input, lrkfac.linalg.LowRankPlusIsotropic):
            close(found.blocks[name].input.values, torch.linalg.eigvalsh(A[0])[-2:].flip(-1), rtol=1e-4)


def test_progress_and_iterators():
    called = []
    evaluate, params, batches, layers = arguments(MLP, [3, 4])
    estimate(evaluate, params, iter(batches), layers, DENSE, progress=called.append)
    assert called == [1, 1]


BAD = {
    "batches: expected pairs": {"batches": [MLP.inputs]},
    "batches: expected an iterable": {"batches": MLP.inputs},
    "batches: expected at least one": {"batches": []},
    "passed 2 times": {"batches": iter([]), "passes": 2},
    "passes: expected": {"passes": 0},
    "progress: expected": {"progress": 1},
    "params: ": {"params": {}},
    "evaluate: expected": {"evaluate": 1},
    "evaluate: expected a function made by": {"evaluate": lambda *_: 1},
    "layers: expected": {"layers": 1},
    "rank: ": {"rank": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    names = "evaluate", "params", "batches", "layers"
    given = dict(zip(names, arguments(MLP, [3, 4]), strict=True)) | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        estimate(**given)


def test_evaluations_without_statistics_are_refused():
    evaluate, params, batches, layers = arguments(MLP, [3, 4])
    with pytest.raises(ValueError, match="with statistics"):
        estimate(lambda *batch: evaluate(*batch, statistics=False), params, batches, layers)
