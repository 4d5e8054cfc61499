"""Derivatives through an update, and a whole grid of hyperparameters, parameters and seeds in one call."""

import itertools
from functools import partial

import optree
import pytest
import torch
from torch.func import grad, vmap

import lrkfac
from lrkfac.structures import kronecker
from tests import cases

CASE = cases.LINEAR[0]
N = 12  # rows enough for factors of full rank, without which eigenpairs have no derivative
INPUTS = torch.randn(N + 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TARGETS = torch.arange(N + 4) % 3
LAYERS = lrkfac.find_layers(CASE.model, CASE.params, CASE.inputs)


def chained(structure):
    """Of a structure, as a function of learning rate and damping."""
    return lambda rate, damping, differentiable: lrkfac.chain(
        lrkfac.precondition_by_fisher(LAYERS, structure, damping=damping, decay=0.7, differentiable=differentiable),
        lrkfac.clip_by_kl(1e2, rate),
        lrkfac.scale_by_learning_rate(rate),
    )


MAKE = {
    "low_rank_kfac": partial(lrkfac.low_rank_kfac, LAYERS, rank=2, decay=0.7, kl_clip=1e2),
    "kfac": partial(lrkfac.kfac, LAYERS, decay=0.7, kl_clip=1e2),
    "corrected": chained(kronecker(lrkfac.structures.dense(), lrkfac.structures.dense(), corrected=True)),
    "blocks": chained(lrkfac.structures.unit_wise()),
}
LIKELIHOOD = lrkfac.categorical()
EVALUATE = lrkfac.evaluator(CASE.model, LIKELIHOOD, LAYERS, "exact")
POINT = (CASE.params, torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64))


def after_two_updates(make, differentiable=False, statistics=(None, None)):
    """The loss of other examples after two updates, as a function of parameters, damping and learning rate."""

    def loss(params, damping, rate):
        tx = make(rate, damping=damping, differentiable=differentiable)
        state, seen = tx.init(params), []
        for fixed in statistics:
            e = EVALUATE(params, INPUTS[:N], TARGETS[:N])
            e = e if fixed is None else e._replace(statistics=fixed)
            seen.append(e.statistics)
            updates, state = tx.update(e.grads, state, params, evaluation=e)
            params = lrkfac.apply_updates(params, updates)
        return LIKELIHOOD.loss(CASE.model(params, INPUTS[N:]), TARGETS[N:]), seen

    return loss


def differences(loss, point, direction, step=1e-5):
    """The central difference of fourth order along a direction."""
    at = lambda t: loss(*optree.tree_map(lambda x, d: x + t * step * d, point, direction))[0]  # noqa: E731
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def directions():
    """Along all parameters, the damping, and the learning rate."""
    zero = optree.tree_map(torch.zeros_like, POINT)
    generator = torch.Generator().manual_seed(1)
    noise = optree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), POINT[0])
    yield (noise, *zero[1:])
    yield (zero[0], torch.ones_like(zero[1]), zero[2])
    yield (zero[0], zero[1], torch.ones_like(zero[2]))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
@pytest.mark.parametrize("differentiable", [False, True])
def test_derivatives_are_those_of_finite_differences(make, differentiable):
    """The factors are constants, unless they are asked for."""
    loss = after_two_updates(make, differentiable)
    found = grad(lambda *point: loss(*point)[0], argnums=(0, 1, 2))(*POINT)
    expected = loss if differentiable else after_two_updates(make, statistics=loss(*POINT)[1])
    for direction in directions():
        pairs = zip(optree.tree_leaves(found), optree.tree_leaves(direction), strict=True)
        along = sum((g * d).sum() for g, d in pairs)
        assert along.abs() > 1e-6
        torch.testing.assert_close(along, differences(expected, POINT, direction), rtol=1e-6, atol=1e-9)


def test_a_grid_of_hyperparameters_parameters_and_seeds_is_one_call():
    """With tensors the same as with numbers."""
    evaluate = lrkfac.evaluator(CASE.model, LIKELIHOOD, LAYERS, "mc")

    def run(params, damping, decay, rate, noise):
        tx = lrkfac.low_rank_kfac(LAYERS, rate, rank=2, damping=damping, decay=decay, kl_clip=1.0)
        state = tx.init(params)
        for u in noise:
            e = evaluate(params, CASE.inputs, CASE.targets, noise=u)
            updates, state = tx.update(e.grads, state, params, evaluation=e)
            params = lrkfac.apply_updates(params, updates)
        return params, e.loss

    many = optree.tree_map(lambda p: torch.stack([p, 0.9 * p]), CASE.params)
    numbers = [torch.tensor(x).double() for x in ([0.1, 1.0], [0.0, 0.8], [0.05, 0.2])]
    noises = torch.rand(2, 3, 1, *CASE.model(CASE.params, CASE.inputs).shape, dtype=torch.float64)
    function = run
    for i in reversed(range(5)):
        function = vmap(function, tuple(0 if j == i else None for j in range(5)))
    found, losses = function(many, *numbers, noises)
    for place in itertools.product(range(2), repeat=5):
        p, *at, s = place
        one = optree.tree_map(lambda x, p=p: x[p], many)
        expected = run(one, *(float(x[i]) for x, i in zip(numbers, at, strict=True)), noises[s])
        torch.testing.assert_close(losses[place], expected[1], rtol=1e-9, atol=1e-12)
        at_place = {name: x[place] for name, x in found.items()}
        torch.testing.assert_close(at_place, expected[0], rtol=1e-7, atol=1e-10)
