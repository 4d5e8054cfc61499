"""Loops over parameters that require gradients keep no graph of past steps."""

import gc
import weakref

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import lrkfac
from tests.compiling import traced
from tests.tensors import normal

INPUTS, TARGETS = normal(12, 4), torch.arange(12) % 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


NET = network()
MODEL = lambda params, x: functional_call(NET, params, (x,))  # noqa: E731
LAYERS = lrkfac.find_layers(MODEL, dict(NET.named_parameters()), INPUTS)
EVALUATE = lrkfac.evaluator(MODEL, lrkfac.categorical(), LAYERS, "exact")


def of_kfac(*links):
    return lrkfac.chain(lrkfac.precondition_by_fisher(LAYERS, rank=3), *links, lrkfac.scale_by_learning_rate(0.1))


def of_matrices(params):
    return optree.tree_map(lambda p: p.ndim == 2, params)


DECAY = lrkfac.add_decayed_weights(0.01)
CHAINS = {
    "low_rank_kfac": lrkfac.low_rank_kfac(LAYERS, 0.1, rank=3, weight_decay=0.01),
    "kfac": lrkfac.kfac(LAYERS, lrkfac.schedules.exponential_decay(0.1, 10, 0.9), weight_decay=0.01),
    "adaptive": lrkfac.adaptive_low_rank_kfac(LAYERS, rank=3, dense_up_to=0, weight_decay=1e-3),
    "adaptive, no decay": lrkfac.adaptive_low_rank_kfac(LAYERS, rank=3, dense_up_to=0, kl_clip=1.0),
    "spectral": lrkfac.spectral_kfac(LAYERS, 0.01, rank=3, weight_decay=0.01),
    "spectral, no rate": lrkfac.spectral_kfac(LAYERS, rank=3, weight_decay=1e-3),
    "adam": lrkfac.chain(lrkfac.scale_by_adam(), DECAY, lrkfac.scale_by_learning_rate(0.01)),
    "ema": of_kfac(DECAY, lrkfac.ema_params()),
    "nesterov": of_kfac(lrkfac.clip(1.0), lrkfac.trace(0.9, nesterov=True), DECAY, lrkfac.clip_by_global_norm(1.0)),
    "finite, masked": of_kfac(lrkfac.apply_if_finite(lrkfac.masked(DECAY, of_matrices), 3)),
    "partition": of_kfac(lrkfac.partition({True: DECAY, False: lrkfac.trace(0.5)}, of_matrices)),
    "injected": lrkfac.inject_hyperparams(lrkfac.low_rank_kfac)(LAYERS, rank=3, learning_rate=0.1, weight_decay=0.01),
    "fallback": lrkfac.chain(
        lrkfac.precondition_by_fisher(LAYERS, rank=3, fallback=DECAY), lrkfac.scale_by_learning_rate(0.1)
    ),
    "accumulate": lrkfac.accumulate(lrkfac.chain(lrkfac.trace(0.9), DECAY, lrkfac.scale(-0.1)), 3),
    "quadratic in masked": lrkfac.masked(
        lrkfac.scale_by_quadratic_model(lrkfac.precondition_by_fisher(LAYERS, rank=3)), of_matrices
    ),
}


def tensors(tree):
    """All tensors of a tree, also those of lazy matrices."""
    for leaf in optree.tree_leaves(tree):
        if isinstance(leaf, lrkfac.LazyMatrix):
            yield from tensors((leaf.left, leaf.right, leaf.terms))
        elif isinstance(leaf, torch.Tensor):
            yield leaf


def nodes(*trees):
    """The number of nodes of autograd's graph that tensors hang on."""
    seen, left = set(), [x.grad_fn for x in tensors(trees)]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return len(seen)


def results(evaluation):
    """What an evaluation has and returns."""
    grads = lrkfac.materialize(evaluation.grads)
    stacked = optree.tree_map(lambda g: torch.stack([g, g]), grads)
    functions = evaluation.product(grads), evaluation.quadratic(grads, grads), evaluation.gram(stacked)
    values = evaluation.loss, evaluation.grads, evaluation.outputs, evaluation.aux, evaluation.statistics
    return *values, evaluation.weight, *functions


def step(evaluate, tx, params, state, statistics=True):
    e = evaluate(params, INPUTS, TARGETS, statistics=statistics)
    updates, state = tx.update(e.grads, state, params, evaluation=e)
    return lrkfac.apply_updates(params, updates), state, e


@pytest.mark.parametrize("name", CHAINS)
def test_parameters_of_a_module_take_no_graph_along(name):
    tx, params = CHAINS[name], dict(NET.named_parameters())
    plain = {name: p.detach().clone() for name, p in params.items()}
    state, other = tx.init(params), tx.init(plain)
    assert nodes(state) == 0
    for i in range(4):
        statistics = i != 1 and name != "accumulate"
        params, state, evaluation = step(EVALUATE, tx, params, state, statistics)
        assert nodes(params, state, results(evaluation), evaluation.loss_at(params)) == 0
        assert not any(x.requires_grad for x in tensors((params, state)))
        plain, other, _ = step(EVALUATE, tx, plain, other, statistics)
    assert optree.tree_all(optree.tree_map(torch.equal, (params, state), (plain, other)))


@pytest.mark.parametrize("name", ["low_rank_kfac", "adaptive", "ema"])
def test_an_ensemble_of_stacked_modules_takes_no_graph_along(name):
    tx, (params, _) = CHAINS[name], stack_module_state([network(seed) for seed in range(3)])
    assert all(p.requires_grad for p in params.values())

    def mapped(params, state):
        params, state, e = step(EVALUATE, tx, params, state)
        return params, state, (e.loss, e.grads, e.statistics)

    state = vmap(tx.init)(params)
    assert nodes(state) == 0
    for _ in range(4):
        params, state, evaluated = vmap(mapped)(params, state)
        assert nodes(params, state, evaluated) == 0
        assert not any(x.requires_grad for x in tensors((params, state, evaluated)))


@pytest.mark.parametrize("name", ["low_rank_kfac", "adaptive"])
def test_memory_is_that_of_one_step(name):
    tx, params = CHAINS[name], dict(NET.named_parameters())
    state, first, alive = tx.init(params), None, []
    for i in range(30):
        params, state, evaluation = step(EVALUATE, tx, params, state)
        first = weakref.ref(evaluation.statistics.scale) if i == 0 else first
        del evaluation
        if i in (9, 29):
            gc.collect()
            alive.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    assert first() is None and alive[0] == alive[1]


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_inputs_targets_constants_and_buffers_take_no_graph_along():
    net = normalised()
    constants = dict(net[:3].named_parameters())
    params = {f"3.{name}": p for name, p in net[3].named_parameters()}

    def model(params, inputs):
        buffers, x = inputs
        buffers = {name: b.clone() for name, b in buffers.items()}
        return functional_call(net, {**constants, **params, **buffers}, (x,)), buffers

    x, targets = INPUTS.clone().requires_grad_(), network()(INPUTS)
    assert targets.requires_grad
    buffers = dict(net.named_buffers())
    layers = lrkfac.find_layers(model, params, (buffers, x))
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "exact", has_aux=True)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=2, dense_up_to=0, weight_decay=1e-3)
    state = tx.init(params)
    for _ in range(5):
        e = evaluate(params, (buffers, x), targets)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params, buffers = lrkfac.apply_updates(params, updates), e.aux
        assert nodes(params, state, results(e), e.loss_at(params)) == 0


def test_micro_batches_and_lazy_gradients_take_no_graph_along():
    params = dict(nn.Linear(40, 40).double().named_parameters())
    model = lambda p, x: F.linear(x, p["weight"], p["bias"])  # noqa: E731
    x, y = normal(4, 40), torch.arange(4)
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact", thin=True)
    tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2, weight_decay=0.01)
    state = tx.init(params)
    for i in range(4):
        e = evaluate(params, x, y)
        assert isinstance(e.grads["weight"], lrkfac.LazyMatrix)
        e = lrkfac.merge_evaluations([e, e]) if i % 2 else e
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        assert nodes(params, state, results(e)) == 0


def test_the_optimizer_of_a_module_takes_no_graph_along():
    net, x = normalised(), INPUTS.clone().requires_grad_()
    optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), x, lr=0.1, rank=2)
    for _ in range(3):
        e = optimizer.evaluate(x, TARGETS)
        optimizer.step()
        assert nodes(results(e), optimizer.chain_state, dict(net.named_buffers())) == 0
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())


@pytest.mark.slow
def test_a_compiled_step_takes_no_graph_along():
    tx, params = CHAINS["low_rank_kfac"], dict(NET.named_parameters())
    plain = {name: p.detach().clone() for name, p in params.items()}
    state, other = tx.init(params), tx.init(plain)

    def run(params, state):
        params, state, e = step(EVALUATE, tx, params, state)
        return params, state, e.loss

    compiled = traced(run)
    for _ in range(3):
        params, state, loss = compiled(params, state)
        assert nodes(params, state, loss) == 0
        plain, other, _ = run(plain, other)
    torch.testing.assert_close((params, state), (plain, other), rtol=1e-9, atol=1e-11)
