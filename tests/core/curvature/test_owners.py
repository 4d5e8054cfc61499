"""Which process owns which layer, by what it costs, and what owners ask; tests/distributed/test_owners.py runs them."""

import optree
import pytest
import torch

import lrkfac
from lrkfac.core.base.processes import Among, Processes
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.costs import explain
from lrkfac.core.curvature.owners import cost, owners_of
from lrkfac.core.curvature.rounds import Undivided
from lrkfac.structures import dense, kronecker
from tests.core.curvature.test_rounds import LOW_RANK, MODELS, STRUCTURES, TwoBlocks, refreshed, start, statistics_of
from tests.lockstep import in_lockstep

OWN = {"default": None, "dense": kronecker(dense(), dense()), "low rank": LOW_RANK}
STRUCTURES = {name: structure for name, (structure, _) in STRUCTURES.items()}
STRUCTURES["without rounds"] = kronecker(TwoBlocks(), dense())


def blocks_of(make, structure):
    model, params, x, _ = make()
    layers = lrkfac.find_layers(model, params, x)
    return layers, blocks(layers, structure, None)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("structure", OWN.values(), ids=OWN.keys())
def test_costs_follow_operations(make, structure):
    """Within a factor of three; diagonals take no products, and count little."""
    layers, assigned = blocks_of(make, structure)
    operations = explain(layers, structure).layers
    ratios = [operations[block.name].apply / cost(block) for block in assigned]
    known = [ratio for ratio in ratios if ratio]
    assert max(known) <= 3 * min(known), ratios


@pytest.mark.parametrize("size", [2, 3, 20])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_largest_go_first_to_the_process_with_least(make, size):
    """No process could give one away to that with least, but for its smallest; all find the same."""
    _, assigned = blocks_of(make, None)
    of_ranks = [owners_of(assigned, Processes("processes", rank, size)).ranks for rank in range(size)]
    assert all(ranks == of_ranks[0] for ranks in of_ranks)
    assert set(of_ranks[0]) == {block.name for block in assigned}
    costs = [[cost(block) for block in assigned if of_ranks[0][block.name] == rank] for rank in range(size)]
    least = min(map(sum, costs))
    assert all(sum(own) - min(own) <= least for own in costs if own)


def test_layers_on_one_parameter_have_one_owner():
    def model(p, x):
        for part in p["many"].chunk(3):
            x = torch.tanh(x @ part)
        return x @ p["out"]

    params, x = {"many": torch.randn(9, 3), "out": torch.randn(3, 3)}, torch.randn(4, 3)
    assigned = blocks(lrkfac.find_layers(model, params, x), None, None)
    owners = owners_of(assigned, Processes("processes", 0, 2))
    assert len(assigned) == 4
    assert owners.parameters == {0: 0, 1: 1}
    assert len({owners.ranks[block.name] for block in assigned[:3]}) == 1


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_questions_have_the_shapes_that_other_processes_expect(make, name):
    layers, leaves, batches = statistics_of(make)
    assigned = blocks(layers, STRUCTURES[name], None)
    expected = owners_of(assigned, Processes("processes", 0, 2)).questions
    seen = {block.name: [] for block in assigned}

    class Recording(Undivided):
        def to_all(self, questions, blocks, round):
            for i, question in questions.items():
                seen[blocks[i].name].append(question)
            return super().to_all(questions, blocks, round)

    def on(process):
        among = Among(process, torch.tensor(16.0), torch.tensor(16.0))
        return refreshed(assigned, start(assigned, leaves), batches[:1], among, Recording(process))

    in_lockstep(1, on)
    for block in assigned:
        assert len(seen[block.name]) == len(expected[block.name]) > 0
        for question, shapes in zip(seen[block.name], expected[block.name], strict=True):
            assert optree.tree_structure(question) == optree.tree_structure(shapes)
            for x, shape in zip(optree.tree_leaves(question), optree.tree_leaves(shapes), strict=True):
                assert (x.shape, x.dtype) == (shape.numbers, shape.dtype or torch.float64)
