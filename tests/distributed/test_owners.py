"""Layers divided among processes: the numbers of processes that all have everything, with a part of the state each."""

import tempfile
from functools import partial
from itertools import pairwise

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

import lrkfac
from lrkfac.checkpoint import state_dict
from lrkfac.core.base.processes import counted
from lrkfac.core.curvature.costs import explain
from lrkfac.structures import dense, kronecker, low_rank, unit_wise
from tests.compiling import traced
from tests.core.curvature.test_rounds import LOW_RANK, images, tokens
from tests.distributed.processes import outcome, run
from tests.tensors import normal

STEPS, EVERY, RATE = 7, 3, 0.05


def perceptron(sizes=(6, 9, 9, 9, 5), examples=12):
    params = {
        f"l{i}": {"w": normal(b, a, seed=i) / a**0.5, "b": normal(b, seed=i) / 9}
        for i, (a, b) in enumerate(pairwise(sizes))
    }
    params["uncovered"] = normal(1)

    def model(p, x):
        for name in sorted(params.keys() - {"uncovered"}):
            x = torch.tanh(F.linear(x, p[name]["w"], p[name]["b"]))
        return x * p["uncovered"].sin()

    return model, params, normal(examples, sizes[0]), torch.arange(examples) % sizes[-1]


def halves():
    """Two layers on parts of one parameter."""

    def model(p, x):
        first, second = p["both"].chunk(2)
        return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, first)), second)), p["out"])

    params = {"both": normal(18, 9) / 3, "out": normal(5, 9)}
    return model, params, normal(12, 9), torch.arange(12) % 5


def preconditioned(structure, **options):
    def chain(layers, owners):
        precondition = lrkfac.precondition_by_fisher(layers, structure, damping=0.1, owners=owners, **options)
        return lrkfac.chain(precondition, lrkfac.scale(-RATE))

    return chain


def ready_made(make, *numbers, **options):
    return lambda layers, owners: make(layers, *numbers, owners=owners, **options)


LOW = ready_made(lrkfac.low_rank_kfac, RATE, rank=2)
ADAPTIVE = ready_made(lrkfac.adaptive_low_rank_kfac, rank=2, dense_up_to=0)
CASES = {
    "low rank: convolutions, a norm, equal layers": (images, LOW, {"scatter": True}),
    "low rank: tied weights": (partial(tokens, True), LOW, {"scatter": True}),
    "low rank: embeddings": (partial(tokens, False), LOW, {}),
    "dense": (perceptron, ready_made(lrkfac.kfac, RATE), {"scatter": True}),
    "dense: two layers on one parameter": (halves, ready_made(lrkfac.kfac, RATE), {"scatter": True}),
    "mixed": (perceptron, preconditioned({"l0": kronecker(dense(), low_rank(2)), "*": LOW_RANK}), {"scatter": True}),
    "corrected": (perceptron, preconditioned(kronecker(low_rank(2), dense(), corrected=True)), {}),
    "units": (images, preconditioned(unit_wise()), {}),
    "without rounds": (perceptron, preconditioned(kronecker(low_rank(2, method="power"), dense())), {}),
    "adaptive": (perceptron, ADAPTIVE, {}),
    "adaptive, one layer": (partial(perceptron, (6, 5)), ADAPTIVE, {}),
    "lazy gradients": (partial(perceptron, (24, 24, 24, 5), 4), LOW, {"thin": True, "scatter": True}),
    "in turns": (perceptron, LOW, {"turns": 2}),
}


class Training:
    """One network on this process' part of the batch; all have parts of different sizes."""

    def __init__(self, make, chain, owners, turns=1, scatter=False, **options):
        model, self.params, x, y = make()
        self.layers = lrkfac.find_layers(model, self.params, x)
        group, options["scatter"] = dist.group.WORLD, owners and scatter
        evaluate = lrkfac.evaluator(model, lrkfac.categorical(), self.layers, "empirical", group=group, **options)
        part = slice(dist.get_rank(), None, dist.get_world_size())
        self.evaluate = lambda params, **chosen: evaluate(params, x[part], y[part], **chosen)
        self.tx = chain(self.layers, group if owners else None)
        self.state, self.steps = self.tx.init(self.params), 0
        self.turn = lrkfac.round_robin_refresh(self.layers, turns)

    def step(self):
        chosen = {"statistics": self.steps % EVERY == 0}
        if self.steps >= EVERY and chosen["statistics"]:
            chosen["layers"] = self.turn(self.steps // EVERY)
        evaluation = self.evaluate(self.params, **chosen)
        updates, self.state = self.tx.update(evaluation.grads, self.state, self.params, evaluation=evaluation)
        self.params = lrkfac.apply_updates(self.params, updates)
        self.steps += 1

    def run(self):
        for _ in range(STEPS):
            self.step()
        return self


def bytes_of(state):
    return sum(x.numel() * x.itemsize for x in optree.tree_leaves(state))


FOR_MORE = ("low rank: convolutions, a norm, equal layers", "mixed", "adaptive, one layer")
"""Cases of more processes, of which some own nothing."""


def trainings():
    """Of each case the largest difference to a training in which all have all, and the bytes of factors of both."""
    results = {}
    for name in CASES if dist.get_world_size() == 2 else FOR_MORE:
        make, chain, options = CASES[name]
        divided, whole = (Training(make, chain, owners, **options).run() for owners in (True, False))
        lrkfac.check_replicas(divided.params, dist.group.WORLD)
        pairs = zip(optree.tree_leaves(divided.params), optree.tree_leaves(whole.params), strict=True)
        moved = zip(optree.tree_leaves(whole.params), optree.tree_leaves(make()[1]), strict=True)
        factors = [bytes_of(preconditioner(one.state).blocks) for one in (divided, whole)]
        results[name] = (
            max(float((a - b).abs().max()) for a, b in pairs),
            max(float((a - b).abs().max()) for a, b in moved),
            factors,
            torch.equal(preconditioner(divided.state).since, preconditioner(whole.state).since),
        )
    return results


def everything():
    """What two processes do, in one start of them, and where their checkpoint is."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0], (trainings(), measured(), others(folder[0]))


@pytest.fixture
def of_two(once):
    folders, results = zip(*once("owners", everything, 2), strict=True)
    return folders[0], list(zip(*results, strict=True))


def preconditioner(state):
    return state[0].preconditioner if hasattr(state[0], "preconditioner") else state[0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_divided_layers_are_the_layers(world, of_two, tmp_path):
    """To rounding, with the same parameters bit for bit everywhere; all factors are somewhere, none is twice."""
    of_ranks = of_two[1][0] if world == 2 else run(trainings, world, tmp_path)
    for name in of_ranks[0]:
        differences, moves, factors, counts = zip(*[results[name] for results in of_ranks], strict=True)
        assert max(differences) < 1e-12, name
        assert max(differences) < 1e-9 * min(moves), name
        assert all(counts), name
        assert sum(own for own, _ in factors) == factors[0][1], name


EQUAL = (20, 20, 20, 20, 20)


def measured():
    """Calls of a step with statistics and of one without, and bytes of factors, of four equal layers."""
    training = Training(partial(perceptron, EQUAL, 20), preconditioned(LOW_RANK), True)
    calls = []
    for statistics in (True, False):
        evaluation = training.evaluate(training.params, statistics=statistics)
        with counted() as of_step:
            _, state = training.tx.update(evaluation.grads, training.state, evaluation=evaluation)
        calls.append(of_step)
    return calls, bytes_of(state[0].blocks)


@pytest.mark.slow
def test_calls_and_bytes(of_two):
    """Two calls for each round and one for the updates; half of the questions, updates and state on each of two."""
    _, params, x, _ = perceptron(EQUAL, 20)
    layers = lrkfac.find_layers(perceptron(EQUAL, 20)[0], params, x)
    k, d_in, d_out, size = 2 + 4, 21, 20, 8
    questions, updates = 2 * k * (d_in + d_out), 2 * d_in * d_out
    first, second = 4 * (k * (d_in + d_out) + d_out + 1), 4 * 2 * k * k
    refresh = [("all_gather", questions), ("reduce_scatter", first), ("all_gather", questions)]
    expected = [*refresh, ("reduce_scatter", second), ("all_gather", updates)], [("all_gather", updates)]
    whole = sum(one.bytes for one in explain(layers, LOW_RANK).layers.values())
    for calls, factors in of_two[1][1]:
        assert [[(name, size * n) for name, n in of_step] for of_step in expected] == calls
        assert factors == whole / 2


def others(folder):
    """Differences of compiled, mapped and the optimizer's updates, and errors of what is refused, by name."""
    training = Training(partial(perceptron, (6, 7, 7, 5)), LOW, True)
    first, second = (training.evaluate(training.params, statistics=one) for one in (True, False))

    def step(state, evaluation=first):
        return training.tx.update(evaluation.grads, state, training.params, evaluation=evaluation)

    expected = step(training.state)
    many = optree.tree_map(lambda x: torch.stack([x, x]), training.state)
    differences = {
        "compiled": compiled(),
        "mapped": difference(optree.tree_map(lambda x: x[1], torch.func.vmap(step)(many)), expected),
        "without statistics": difference(
            optree.tree_map(lambda x: x[1], torch.func.vmap(partial(step, evaluation=second))(many)),
            step(training.state, second),
        ),
    }
    state = expected[1]
    own = next(one for one in state[0].blocks.values() if one)
    both = state[0]._replace(blocks={name: one or own for name, one in state[0].blocks.items()})
    other = preconditioned(kronecker(dense(), low_rank(2 + dist.get_rank())))(training.layers, dist.group.WORLD)
    alone = second._replace(among=None)
    refused = {
        "another evaluation": outcome(lambda: step(state, alone)),
        "another state": outcome(lambda: step((both, *state[1:]))),
        "another structure": outcome(lambda: other.update(first.grads, other.init(training.params), evaluation=first)),
    }
    partial_gradients = Training(partial(perceptron, (6, 7, 7, 5)), LOW, True, scatter=True).evaluate(training.params)
    differences["gradients"] = difference(lrkfac.materialize(partial_gradients.grads), first.grads)
    for name, tx in {
        "parts without owners": LOW(training.layers, None),
        "parts before": lrkfac.trace(0.9),
        "parts, adaptive": ADAPTIVE(training.layers, dist.group.WORLD),
    }.items():
        update = partial(tx.update, partial_gradients.grads, tx.init(training.params), training.params)
        refused[name] = outcome(partial(update, evaluation=partial_gradients))
    differences["optimizer"], refused["a group more"] = optimizers()
    names = list(lrkfac.diagnose(state, training.layers).layers)
    dcp.save(state_dict(state), checkpoint_id=folder)
    return differences, refused, names, len(lrkfac.ranks_by_trace(state, training.layers)), state


def compiled():
    """The difference of a compiled update of one layer, which one process owns."""
    training = Training(partial(perceptron, (6, 5)), preconditioned(LOW_RANK), True, scatter=True)
    evaluation = training.evaluate(training.params)

    def step(state):
        return training.tx.update(evaluation.grads, state, evaluation=evaluation)

    return difference(traced(step)(training.state), step(training.state))


def optimizers():
    """The difference between optimizers with divided layers and without, and the error of a group more."""
    params = []
    for owners in (dist.group.WORLD, None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        options = {"lr": 0.1, "rank": 2, "group": dist.group.WORLD, "owners": owners, "params": net[2:].parameters()}
        x, y = normal(6, 6, seed=dist.get_rank()), torch.arange(6) % 4
        optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), x, statistics_every=2, **options)
        with counted() as calls:
            for _ in range(4):
                optimizer.step(x, y)
            optimizer.evaluate(x, y)
            optimizer.step()
        assert ("reduce_scatter" in [name for name, _ in calls]) == (owners is not None)
        params.append([p.detach() for p in net.parameters()])
        if owners is not None:
            error = outcome(lambda net=net, tx=optimizer: tx.add_param_group({"params": list(net[0].parameters())}))
    return difference(*params), error


def difference(one, other):
    pairs = zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a.is_floating_point())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_other_uses(of_two):
    """Under the compiler and ``vmap``; refused on all processes; diagnosed and saved by each; read by one."""
    folder, (_, _, of_ranks) = of_two
    for rank, (differences, refused, _, _, _) in enumerate(of_ranks):
        assert max(differences.values()) < 1e-12, differences
        assert "by the 2 processes of owners=, got one of one process" in refused["another evaluation"]
        assert f"alone has its averages, but rank {rank} has some" in refused["another state"]
        for name in ("parts without owners", "parts before", "parts, adaptive"):
            assert "expected whole gradients, got one process' part" in refused[name], name
        assert "owners: expected the layers that the optimizer was made with" in refused["a group more"]
        assert "precondition_by_fisher: expected the same on all 2 ranks" in refused["another structure"]
    assert sorted(of_ranks[0][2] + of_ranks[1][2]) == ["l0", "l1", "l2"] and of_ranks[0][3] + of_ranks[1][3] == 3
    model, params, x, _ = perceptron((6, 7, 7, 5))
    read = state_dict(LOW(lrkfac.find_layers(model, params, x), None).init(params))
    dcp.load(read, checkpoint_id=folder)
    saved = state_dict(of_ranks[0][4]) | state_dict(of_ranks[1][4])
    assert read.keys() == saved.keys() and all(torch.equal(x, saved[name]) for name, x in read.items())
