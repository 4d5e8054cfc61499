"""Two processes with parts of odd kinds: other axes in front, some examples, rows that are not finite; and copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lrkfac
from tests.distributed.processes import run

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(4, 8, 6, dtype=torch.float64, generator=GENERATOR), torch.arange(32).reshape(4, 8) % 3
PARTS = slice(0, 5), slice(5, 8)
CHOSEN = torch.tensor([0, 1, 2, 6])
"""Three quarters of the examples that statistics are taken of are those of the first process."""


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model, params = lrkfac.from_module(net)
    return net, model, params


def stepped(params, evaluations, layers, wrap=lambda tx: tx):
    tx = wrap(lrkfac.low_rank_kfac(layers, 0.1, rank=3, damping=0.1))
    state = tx.init(params)
    for evaluate in evaluations:
        evaluation = evaluate(params)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
    return torch.cat([p.flatten() for p in params.values()])


def examples_along_the_second_axis(part, group):
    """Outputs ``[T, N, 3]`` of a model that mixes positions."""
    _, each, params = network()
    model = lambda p, x: each(p, x).cumsum(0)  # noqa: E731
    layers = lrkfac.find_layers(model, params, X)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical", group=group)
    call = lambda p: evaluate(p, X[:, part], Y[:, part])  # noqa: E731
    return stepped(params, [call] * 3, layers)


def merged_statistics_of_some_examples(part, group):
    _, model, params = network()
    layers = lrkfac.find_layers(model, params, X[0])
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    own = CHOSEN[(CHOSEN >= part.start) & (CHOSEN < part.stop)] - part.start
    calls = [
        lambda p, x=x, y=y: lrkfac.merge_evaluations([evaluate(p, x[part], y[part], examples=own)], group=group)
        for x, y in zip(X, Y, strict=True)
    ]
    return stepped(params, calls, layers)


def rows_of_one_that_are_not_finite(part, group):
    """The step is skipped on both; so it is by one process that has such a row."""
    _, model, params = network()
    layers = lrkfac.find_layers(model, params, X[0])
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact", group=group)

    def spoiled(p, x, y, spoil):
        evaluation = evaluate(p, x[part], y[part])
        if not spoil or part.stop < len(x):
            return evaluation
        gradients = with_infinity(evaluation.statistics.output_gradients)
        return evaluation._replace(statistics=evaluation.statistics._replace(output_gradients=gradients))

    calls = [lambda p, i=i: spoiled(p, X[i], Y[i], i == 1) for i in range(3)]
    return stepped(params, calls, layers, lambda tx: lrkfac.apply_if_finite(tx, 3))


def with_infinity(gradients):
    (name, (rows,)), *others = gradients.items()
    rows = rows.clone()
    rows[0, -1, 0] = torch.inf
    return {name: (rows,), **dict(others)}


def copies_of_an_optimizer(part, group):
    net, *_ = network()
    optimizer = lrkfac.LowRankKFAC(
        net, lrkfac.categorical(), X[0], lr=0.1, rank=3, estimator="exact", statistics_every=2, group=group
    )
    ways = copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both)), saved
    for x, y, copied in zip(X, Y, (lambda both: both, *ways), strict=True):
        net, optimizer = copied((net, optimizer))
        optimizer.step(x[part], y[part])
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def saved(both):
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TRAININGS = [
    examples_along_the_second_axis,
    merged_statistics_of_some_examples,
    rows_of_one_that_are_not_finite,
    copies_of_an_optimizer,
]


def on_a_process():
    return {one.__name__: one(PARTS[dist.get_rank()], dist.group.WORLD) for one in TRAININGS}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return run(on_a_process, 2, tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("training", TRAININGS, ids=lambda one: one.__name__)
def test_two_processes_equal_one(of_two, training):
    first, second = (results[training.__name__] for results in of_two)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, training(slice(0, 8), None), rtol=1e-12, atol=1e-12)
