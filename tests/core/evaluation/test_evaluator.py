"""Evaluations of a batch: loss, gradients and factors are the reference's for every network."""

from operator import attrgetter

import optree
import pytest
import torch
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import lrkfac
from lrkfac import evaluator, find_layers
from lrkfac.core.base import autograd
from lrkfac.core.curvature import covariances
from lrkfac.core.layers.matrix import split_groups
from lrkfac.testing import gradients
from tests import cases, reference_networks
from tests.described import layers_of
from tests.tensors import close

CASE = cases.LINEAR[0]
P, X, Y = CASE.params, CASE.inputs, CASE.targets
DISCRETE_AND_GAUSSIAN = [*cases.LINEAR[:3], cases.SEQUENCE[2], cases.CONVOLUTION[3]]


def each(*chosen):
    return pytest.mark.parametrize("case", chosen, ids=attrgetter("name"))


each_estimator = pytest.mark.parametrize("estimator", ["mc", "exact", "empirical", "forward_only"])


def likelihood(case):
    return getattr(lrkfac, case.likelihood)(**case.likelihood_options)


def evaluator_of(case, estimator="mc", bias="joint", **options):
    layers = layers_of(case, bias)
    return evaluator(case.model, likelihood(case), layers, estimator, **options)


def evaluate(case, estimator="mc", statistics=True, noise=None, **options):
    f = evaluator_of(case, estimator, **options)
    noise = noise if estimator == "mc" else None
    return f(case.params, case.inputs, case.targets, statistics, noise=noise)


def factors(case, evaluation):
    """``A`` and ``B`` of every layer, each ``[groups, d, d]``."""
    result, (recorded, gradients, scale, _) = {}, evaluation.statistics
    for layer in layers_of(case):

        def one(a, g, layer=layer):
            result = covariances.kronecker_factors(layer, a, g, scale)
            return reference_networks.Factors(result.input.dense(), result.output.dense())

        rows = (split_groups(layer, tensors[layer.name]) for tensors in (recorded, gradients))
        result[layer.name] = vmap(one)(*rows) if layer.groups > 1 else optree.tree_map(lambda m: m[None], one(*rows))
    return result


def noise_for(case, samples=1):
    outputs, generator = case.model(case.params, case.inputs), torch.Generator().manual_seed(1)
    return torch.rand(samples, *outputs.shape, generator=generator, dtype=torch.float64)


@each(*cases.ALL)
@pytest.mark.parametrize("estimator", ["mc", "exact", "empirical", "forward_only", None])
def test_loss_gradients_and_factors_are_those_of_the_reference(case, estimator):
    result = evaluate(case, estimator or "mc", statistics=estimator is not None)
    close((result.loss, result.grads), (reference_networks.loss(case), reference_networks.gradients(case)))
    assert torch.equal(result.outputs, case.model(case.params, case.inputs))
    assert result.aux is None and (result.statistics is None) == (estimator is None)
    other = optree.tree_map(lambda p: p + 0.1, case.params)
    close(result.loss_at(other), reference_networks.loss(case, other))
    if estimator not in ("mc", None):
        close(factors(case, result), reference_networks.factors(case, estimator))
    if estimator == "forward_only":
        assert result.statistics.output_gradients == {layer: () for layer in result.statistics.inputs}
    if estimator == "exact" and case in cases.EXACT:
        for name, (A, B) in factors(case, result).items():
            close(torch.kron(B[0], A[0]), reference_networks.gauss_newton_blocks(case, name)[0])


@each(*DISCRETE_AND_GAUSSIAN)
def test_sampled_gradients_are_those_at_the_labels(case):
    """Factors are the mean over samples. Their expectation: ``tests/core/likelihoods/test_protocol.py``."""
    noise, outputs = noise_for(case, 2), case.model(case.params, case.inputs)
    _, gradients, scale, _ = evaluate(case, samples=2, noise=noise).statistics
    close(2 * scale, evaluate(case, noise=noise[:1]).statistics.scale)
    for i in range(2):
        labels = likelihood(case).sample(outputs, noise[i])
        for name, g in reference_networks.output_gradients(case._replace(targets=labels)).items():
            close(gradients[name][0][i], g)


@each(*cases.ALL)
def test_products_are_those_of_the_gauss_newton_matrix(case):
    result, matrix = evaluate(case, statistics=False), reference_networks.gauss_newton_matrix(case)
    u, v = gradients(case.params, 1), gradients(case.params, 2)
    both = torch.stack([reference_networks.flatten(u), reference_networks.flatten(v)])
    expected = both @ matrix @ both.mT
    product, stacked = result.product(u), optree.tree_map(lambda *leaves: torch.stack(leaves), u, v)
    assert {name: p.shape for name, p in product.items()} == {name: p.shape for name, p in u.items()}
    close(torch.cat([product[name].flatten() for name in u]), matrix @ both[0])
    close((result.quadratic(u, v), result.quadratic(u, u)), (expected[0, 1], expected[0, 0]))
    close(result.gram(stacked), expected)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def cost(case, estimator="mc", samples=1, **selection):
    """That of an evaluation after the first."""
    f = evaluator_of(case, estimator, samples=samples)
    run = lambda: f(case.params, case.inputs, case.targets, **selection)  # noqa: E731
    run()
    return flops(run)


@each(CASE, cases.SEQUENCE[0], cases.CONVOLUTION[0])
def test_costs(case):
    """That of a gradient, also with statistics at the true targets or none; one more way back for each sample."""
    loss = lambda p: reference_networks.loss(case, p)  # noqa: E731
    forward, gradient = flops(lambda: loss(case.params)), flops(lambda: grad(loss)(case.params))
    for estimator in ("mc", "exact", "empirical"):
        assert cost(case, estimator, statistics=False) == gradient > 0
    assert cost(case, "empirical") == cost(case, "forward_only") == gradient
    assert gradient < cost(case) < gradient + forward
    assert cost(case, samples=3) - gradient == 3 * (cost(case) - gradient)


@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "gradient"])
def test_auxiliary_results_come_through(statistics):
    aux = {"x": X, "any": [None, (4, "text")]}
    model = lambda p, x: (CASE.model(p, x), (p["0.weight"].sum(), aux))  # noqa: E731
    layers = find_layers(CASE.model, P, X)
    result = evaluator(model, lrkfac.categorical(), layers, has_aux=True)(P, X, Y, statistics)
    total, same = result.aux
    close((total, result.loss_at(P)), (P["0.weight"].sum(), reference_networks.loss(CASE)))
    assert torch.equal(same["x"], X) and same["any"] == aux["any"]


def test_randomness_is_an_argument_or_torchs_seed():
    noise, f = noise_for(CASE), evaluator_of(CASE)
    run = lambda **more: f(P, X, Y, **more).statistics  # noqa: E731
    state = torch.get_rng_state()
    close(run(noise=noise), run(noise=noise), 0, 0)
    f(P, X, Y, statistics=False)
    assert torch.equal(torch.get_rng_state(), state), "neither draws anything"
    drawn = [torch.manual_seed(seed) and run().output_gradients["4"][0] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_refused_by_name():
    """Bad values of every other kind: ``tests/test_public_calls.py``."""
    layers = find_layers(CASE.model, P, X)
    for statistics in (True, False):
        for wrap, has_aux in ((lambda y: (y, y), False), (lambda y: y, True), (lambda y: {"y": y}, True)):
            model = lambda p, x, wrap=wrap: wrap(CASE.model(p, x))  # noqa: E731
            with pytest.raises(TypeError, match=r"model: expected .*has_aux"):
                evaluator(model, lrkfac.categorical(), layers, has_aux=has_aux)(P, X, Y, statistics)
    with pytest.raises(ValueError, match=r"noise: .*\(1, 7, 3\), got \(1, 1, 3\)"):  # which would broadcast
        evaluator_of(CASE)(P, X, Y, noise=torch.rand(1, 1, 3))
    with pytest.raises(ValueError, match="samples: expected 1 for the estimator 'exact', which draws nothing, got 2"):
        evaluator_of(CASE, "exact", samples=2)


ODD = {
    "non-contiguous": (lambda p: torch.stack([p, p], -1)[..., 0], lambda x: x.mT.contiguous().mT),
    "non-leaf": (lambda p: p.clone().requires_grad_() * 1, lambda x: x.clone().requires_grad_() * 1),
    "batch of one": (torch.clone, lambda x: x[:1]),
    "zero inputs": (torch.clone, torch.zeros_like),
    "zero parameters": (torch.zeros_like, torch.clone),
}


@each_estimator
@pytest.mark.parametrize(("of_param", "of_inputs"), ODD.values(), ids=ODD.keys())
@each(cases.LINEAR[4], cases.CONVOLUTION[3])
def test_odd_tensors_just_work(case, of_param, of_inputs, estimator):
    inputs, params = of_inputs(case.inputs), optree.tree_map(of_param, case.params)
    case = case._replace(params=params, inputs=inputs, targets=case.targets[: len(inputs)])
    before = optree.tree_map(torch.clone, (case.params, case.inputs, case.targets))
    result = evaluate(case, estimator)
    close(result.grads, reference_networks.gradients(case))
    if estimator != "mc":
        close(factors(case, result), reference_networks.factors(case, estimator))
    close((case.params, case.inputs, case.targets), before)


@pytest.mark.parametrize("forgets", [False, True])
def test_derivatives_that_would_be_zero_are_refused(forgets, monkeypatch):
    """Under torch.inference_mode in torch 2.11; with other versions they are what they are elsewhere."""
    params, x, y = {"w": torch.ones(3, 2)}, torch.ones(4, 2), torch.zeros(4, 3)

    def model(params, x):
        return x @ params["w"].T

    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), lrkfac.find_layers(model, params, x))
    outside = evaluate(params, x, y)
    really = autograd.forgets_derivatives()
    monkeypatch.setattr(autograd, "forgets_derivatives", lambda: forgets or really)
    with torch.inference_mode():
        if forgets or really:
            for call in (lambda: evaluate(params, x, y), lambda: outside.quadratic(params, params)):
                with pytest.raises(RuntimeError, match=r"torch.inference_mode.*zero.*torch.no_grad"):
                    call()
        else:
            assert torch.equal(evaluate(params, x, y).grads["w"], outside.grads["w"]) and outside.grads["w"].any()
            assert outside.quadratic(params, params) > 0
