"""Derivatives through an update, and a whole grid of hyperparameters, parameters and seeds in one call."""

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
STRUCTURES = {
    "low rank": kronecker(lrkfac.structures.low_rank(2), lrkfac.structures.low_rank_plus_diagonal(1)),
    "dense": kronecker(lrkfac.structures.dense(), lrkfac.structures.dense()),
    "corrected": kronecker(lrkfac.structures.dense(), lrkfac.structures.dense(), corrected=True),
    "blocks": lrkfac.structures.unit_wise(),
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
LIKELIHOOD = lrkfac.categorical()
EVALUATE = lrkfac.evaluator(CASE.model, LIKELIHOOD, LAYERS, "exact")
POINT = (CASE.params, torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64))


def after_two_updates(structure, statistics=(None, None), **options):
    """The loss of other examples after two updates, as a function of parameters, damping and learning rate."""

    def loss(params, damping, rate):
        tx = lrkfac.chain(
            lrkfac.precondition_by_fisher(LAYERS, structure, damping=damping, decay=0.7, **options),
            lrkfac.clip_by_kl(1e2, rate),
            lrkfac.scale_by_learning_rate(rate),
        )
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


@each_structure
@pytest.mark.parametrize("differentiable", [False, True])
def test_derivatives_are_those_of_finite_differences(structure, differentiable):
    """The factors are constants, unless they are asked for."""
    loss = after_two_updates(structure, differentiable=differentiable)
    found = grad(lambda *point: loss(*point)[0], argnums=(0, 1, 2))(*POINT)
    constant = (None, None) if differentiable else loss(*POINT)[1]
    expected = after_two_updates(structure, constant)
    for direction in directions():
        pairs = zip(optree.tree_leaves(found), optree.tree_leaves(direction), strict=True)
        along = sum((g * d).sum() for g, d in pairs)
        assert along.abs() > 1e-6
        torch.testing.assert_close(along, differences(expected, POINT, direction), rtol=1e-6, atol=1e-9)


def test_the_choice_changes_the_derivatives():
    one, other = (
        grad(lambda p, k=k: after_two_updates(STRUCTURES["dense"], differentiable=k)(p, *POINT[1:])[0])(POINT[0])
        for k in (False, True)
    )
    assert not torch.allclose(one["0.weight"], other["0.weight"], rtol=1e-3)


def test_the_ready_made_chains_pass_it_on():
    """``kfac`` and ``low_rank_kfac`` of full rank: derivatives as those of the chain that they are."""

    def after(make, params):
        tx = make()
        state = tx.init(params)
        for _ in range(2):
            e = EVALUATE(params, INPUTS[:N], TARGETS[:N])
            updates, state = tx.update(e.grads, state, params, evaluation=e)
            params = lrkfac.apply_updates(params, updates)
        return LIKELIHOOD.loss(CASE.model(params, INPUTS[N:]), TARGETS[N:])

    makes = [
        lambda structure=structure, k=k: lrkfac.chain(
            lrkfac.precondition_by_fisher(LAYERS, structure, damping=0.3, differentiable=k),
            *(lrkfac.clip_by_kl(1e2, 0.2), lrkfac.trace(0.9)),
            lrkfac.scale_by_learning_rate(0.2),
        )
        for structure in (
            STRUCTURES["dense"],
            kronecker(lrkfac.structures.low_rank(16), lrkfac.structures.low_rank_plus_diagonal(16)),
        )
        for k in (False, True)
    ]
    options = [{"damping": 0.3, "kl_clip": 1e2, "differentiable": k} for k in (False, True)]
    ready = [lambda o=o: lrkfac.kfac(LAYERS, 0.2, **o) for o in options]
    ready += [lambda o=o: lrkfac.low_rank_kfac(LAYERS, 0.2, rank=16, **o) for o in options]
    found, expected = ([grad(lambda p, m=m: after(m, p))(CASE.params) for m in of] for of in (ready, makes))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0]["0.weight"], found[1]["0.weight"], rtol=1e-3)


def test_a_grid_of_hyperparameters_parameters_and_seeds_is_one_call():
    evaluate = lrkfac.evaluator(CASE.model, LIKELIHOOD, LAYERS, "mc")

    def run(params, damping, rate, noise):
        tx = lrkfac.low_rank_kfac(LAYERS, rate, rank=2, damping=damping, kl_clip=1.0)
        state = tx.init(params)
        for u in noise:
            e = evaluate(params, CASE.inputs, CASE.targets, noise=u)
            updates, state = tx.update(e.grads, state, params, evaluation=e)
            params = lrkfac.apply_updates(params, updates)
        return params, e.loss

    many = optree.tree_map(lambda p: torch.stack([p, 0.9 * p]), CASE.params)
    dampings, rates = torch.tensor([0.1, 1.0]).double(), torch.tensor([0.05, 0.1, 0.2]).double()
    noises = torch.rand(2, 3, 1, *CASE.model(CASE.params, CASE.inputs).shape, dtype=torch.float64)
    over = [(0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0)]
    function = run
    for dims in reversed(over):
        function = vmap(function, dims)
    found, losses = function(many, dampings, rates, noises)
    assert losses.shape == (2, 2, 3, 2)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in losses.shape]):
        p, d, r, s = place.tolist()
        one = optree.tree_map(lambda x, p=p: x[p], many)
        expected, loss = run(one, dampings[d], rates[r], noises[s])
        torch.testing.assert_close(losses[p, d, r, s], loss, rtol=1e-9, atol=1e-12)
        for name, x in expected.items():
            torch.testing.assert_close(found[name][p, d, r, s], x, rtol=1e-7, atol=1e-10)
