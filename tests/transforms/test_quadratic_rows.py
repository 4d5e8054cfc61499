"""The quadratic model of a network with large leaves, whose memory is used again: the same steps, nothing changed."""

import optree
import torch
from torch import nn

import lrkfac
from lrkfac.core.base.packing import LARGE, as_rows, from_rows
from tests.transforms.test_base import close


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(280, 240), nn.ReLU(inplace=True), nn.Linear(240, 300, bias=False), nn.Tanh(),
                        nn.Linear(300, 3)).double()  # fmt: skip
    model, params = lrkfac.from_module(net)
    return model, params


def batches(number):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        x, noise = torch.randn(6, 280, generator=generator), torch.rand(1, 6, 3, generator=generator)
        yield x.double(), torch.randint(3, (6,), generator=generator), noise.double()


def path(thin, spoiled=(), **options):
    """Updates and states of six steps; batches of the given numbers are not finite."""
    model, params = network()
    layers = lrkfac.find_layers(model, params, torch.zeros(6, 280).double())
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=thin)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=2, dense_up_to=0, **options)
    state, steps = tx.init(params), []
    for i, (x, y, noise) in enumerate(batches(6)):
        x = x * float("inf") if i in spoiled else x
        statistics = i % 3 == 0
        e = evaluate(params, x, y, statistics=statistics, noise=noise if statistics else None)
        given, gradients = optree.tree_map(torch.clone, (params, state)), lrkfac.materialize(e.grads)
        updates, new = tx.update(e.grads, state, params, evaluation=e)
        assert optree.tree_all(optree.tree_map(torch.equal, given, (params, state)))
        if i not in spoiled:
            close(lrkfac.materialize(e.grads), gradients, rtol=0, atol=0)
        memory = [x.data_ptr() for x in optree.tree_leaves((updates, new))]
        assert len(set(memory)) == len(memory)
        state, params = new, lrkfac.apply_updates(params, updates)
        steps.append((updates, state))
    return steps


def test_lazy_gradients_change_no_step():
    """Their memory becomes that of the sum of gradients."""
    for options in ({}, {"weight_decay": 1e-3, "kl_clip": 0.1}, {"gradient_decay": 0.0}):
        for (updates, state), (expected, other) in zip(path(True, **options), path(False, **options), strict=True):
            close(updates, expected, rtol=1e-6, atol=1e-12)
            close(state[0].total, other[0].total, rtol=1e-6, atol=1e-12)
            assert state[0].rejected == other[0].rejected


def test_bad_batches_change_nothing():
    steps = path(True, spoiled=(1, 3))
    for number in (1, 3):
        (_, before), (updates, after) = steps[number - 1 : number + 1]
        close(updates, optree.tree_map(torch.zeros_like, updates), rtol=0, atol=0)
        close(after[0]._replace(failures=before[0].failures), before[0], rtol=0, atol=0)


def test_rows_are_the_tree():
    tree = {
        "a": torch.randn(3),
        "b": torch.randn(LARGE // 16, 16),
        "c": torch.randn(2, 2).half(),
        "d": torch.randn(LARGE),
        "e": torch.randn(()),
        "f": torch.randn(0, 2),
    }
    rows = as_rows(tree)
    assert [len(row) for row in rows] == [8, LARGE, LARGE] and all(row.dtype == torch.float32 for row in rows)
    assert rows[1].data_ptr() == tree["b"].data_ptr()
    close(from_rows(rows, tree), tree, rtol=0, atol=0)
    large = {"b": tree["b"]}
    close(from_rows(as_rows(large), large), large, rtol=0, atol=0)
    pairs = as_rows(optree.tree_map(lambda x: torch.stack([x, 2 * x]), tree), stacked=True)
    close(tuple(x[1] for x in pairs), tuple(2 * x for x in rows))


def test_a_parameter_that_is_a_number_is_stepped():
    params, x, y = {"w": torch.eye(3), "scale": torch.ones(())}, torch.randn(8, 3), torch.randint(3, (8,))
    model = lambda params, x: params["scale"].exp() * x @ params["w"].T  # noqa: E731
    layers = lrkfac.find_layers(model, params, x)
    evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), lrkfac.adaptive_low_rank_kfac(layers)
    state, first = tx.init(params), evaluate(params, x, y).loss
    for statistics in (True, False, True):
        e = evaluate(params, x, y, statistics=statistics)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        assert updates["scale"].shape == () and updates["scale"] != 0
        params = lrkfac.apply_updates(params, updates)
    assert e.loss < first


def test_a_step_is_remembered_where_bad_batches_give_no_direction():
    """The clip that follows the preconditioner makes NaN of all of it; the second failure still takes the step back."""
    model, params = network()
    layers = lrkfac.find_layers(model, params, torch.zeros(6, 280).double())
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
    precondition = lrkfac.chain(lrkfac.precondition_by_fisher(layers), lrkfac.clip_by_kl(1.0, 0.1))
    tx = lrkfac.scale_by_quadratic_model(precondition)
    state = tx.init(params)
    for (x, y, _), statistics in zip(batches(2), (True, False), strict=True):
        e = evaluate(params, x, y, statistics=statistics)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
    bad = evaluate(params, x * float("nan"), y, statistics=False)
    nothing, once = tx.update(bad.grads, state, params, evaluation=bad)
    close(nothing, optree.tree_map(torch.zeros_like, nothing), rtol=0, atol=0)
    close(once.last, state.last, rtol=0, atol=0)
    back, twice = tx.update(bad.grads, once, params, evaluation=bad)
    close(back, optree.tree_map(torch.neg, updates), rtol=0, atol=0)
    assert twice.rejected == 1 and any(leaf.any() for leaf in back.values())
