"""The noise of gradients: the share of a batch's slope that the next batch does not see, and the decay that follows."""

import math

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac.transforms.quadratic_state import LARGEST_DECAY, MEMORY, Chosen, GradientNoise
from tests.transforms.test_base import close

SIZE = 6
OPTIONS = lrkfac.QuadraticModelOptions(start_steps=0.0)


def linear_regression(batch, noise, dtype=torch.float64, seed=0):
    """A model that is quadratic, whose Hessian is the Fisher matrix; batches of it, and the chain's parts."""
    g = torch.Generator().manual_seed(seed)
    params = {"w": torch.zeros(2, SIZE, dtype=dtype)}
    truth = torch.randn(2, SIZE, generator=g).to(dtype)
    model = lambda p, x: x @ p["w"].T  # noqa: E731
    layers = lrkfac.find_layers(model, params, torch.randn(3, SIZE, dtype=dtype))
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "exact")

    def batches():
        while True:
            x = torch.randn(batch, SIZE, generator=g).to(dtype)
            yield x, x @ truth.T + noise * torch.randn(batch, 2, generator=g).to(dtype)

    return params, layers, evaluate, batches()


def path(steps, batch=8, noise=1.0, same=False, dtype=torch.float64, every=2, **arguments):
    """States before each step, batches, parameters, updates and states after."""
    params, layers, evaluate, batches = linear_regression(batch, noise, dtype)
    arguments = {"gradient_decay": None, "damping": 0.5, "options": OPTIONS, **arguments}
    tx = lrkfac.scale_by_quadratic_model(lrkfac.precondition_by_fisher(layers, rank=2), **arguments)
    state, one = tx.init(params), next(batches)
    for i in range(steps):
        x, y = one if same else next(batches)
        e = evaluate(params, x, y, i % every == 0)
        updates, new = tx.update(e.grads, state, params, evaluation=e)
        yield state, (x, y), params, updates, new
        state, params = new, lrkfac.apply_updates(params, updates)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_next_batch_is_asked_for_its_slope_where_the_step_began(weight_decay):
    """Where the model is exact, by its gradient there, which is never computed in training."""
    *_, evaluate, _ = linear_regression(8, 1.0)
    slope = lambda batch, params, step: sum(  # noqa: E731
        ((g + weight_decay * p) * u).sum()
        for g, p, u in zip(evaluate(params, *batch, False).grads.values(), params.values(), step.values(), strict=True)
    )
    unseen = slopes = torch.zeros((), dtype=torch.float64)
    previous = None
    for _, batch, params, updates, new in path(12, weight_decay=weight_decay, every=1):
        close(new.gradient_decay, (unseen / slopes).nan_to_num().clamp(0, LARGEST_DECAY), rtol=1e-6, atol=1e-9)
        if previous is not None:
            before, step, own = previous
            unseen = MEMORY * unseen + own - slope(batch, before, step)
            slopes = MEMORY * slopes + own
            close((new.noise.unseen, new.noise.slopes), (unseen, slopes), rtol=1e-6, atol=1e-9)
        close(new.noise.slope, own := slope(batch, params, updates), rtol=1e-6, atol=1e-9)
        previous = params, updates, own
    assert 0.1 < new.gradient_decay < 0.9


def test_equal_batches_have_no_noise():
    """So that the same chain preconditions the gradient of the full batch."""
    for *_, new in path(12, same=True):
        assert new.gradient_decay.abs() < 1e-9


def test_more_noise_reaches_farther_back():
    last = [list(path(12, batch))[-1][-1].gradient_decay for batch in (4, 32, 2000)]
    assert last[0] > 0.6 > 0.4 > last[1] > 0.2 > 0.1 > last[2]


def test_the_first_step_takes_the_gradient_of_its_batch():
    (first, *_) = path(1)
    assert first[-1].gradient_decay == 0


def test_a_number_is_kept():
    for *_, new in path(4, gradient_decay=0.7):
        assert new.gradient_decay == 0.7


def test_float32_follows_float64():
    double, single = ([new.gradient_decay for *_, new in path(15, dtype=x)] for x in (torch.float64, torch.float32))
    close(torch.stack(single).double(), torch.stack(double), rtol=2e-3)


def test_an_ensemble_has_a_decay_for_each():
    params, layers, evaluate, batches = linear_regression(8, 1.0)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=2, options=OPTIONS)

    def step(params, state, x, y):
        e = evaluate(params, x, y)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state

    each = [(params, tx.init(params)) for _ in range(2)]
    together = optree.tree_map(lambda *x: torch.stack(x), *each)
    for _ in range(4):
        data = [next(batches) for _ in each]
        each = [step(*one, *batch) for one, batch in zip(each, data, strict=True)]
        together = vmap(step)(*together, *[torch.stack(x) for x in zip(*data, strict=True)])
    decays = torch.stack([state[0].gradient_decay for _, state in each])
    close(together[1][0].gradient_decay, decays, rtol=1e-8)
    assert decays[0] != decays[1]


# By hand -------------------------------------------------------------------------------------------------


def numbers(*values):
    return [torch.tensor(x, dtype=torch.float64) for x in values]


def test_what_the_model_misses_is_no_noise():
    """A parabola of slope -2 that falls by 0.7 has the slope 2 (-0.7) + 2 = 0.6 at its end; the model said -1 and 0."""
    chosen = Chosen(*numbers(1.0, 0.0, -0.95, -2.0, 0.1, 0.2))
    accepted, (squares, change) = torch.tensor(True), numbers(0.5, -0.7)
    noise = GradientNoise(*numbers(0.0, 0.0, 0.0, 0.0)).judged(chosen, squares, change, accepted)
    close(noise.missed, *numbers(0.3))
    noise, curvature = noise.stepped(chosen, accepted), 2.0
    assert noise.compared(*numbers(0.6 - curvature)).share() < 1e-12
    assert noise.compared(*numbers(1.6 - curvature)).share() == pytest.approx(0.5)


def test_a_step_that_is_undone_says_nothing():
    chosen = Chosen(*numbers(1.0, 0.0, -1.0, -2.0, 0.1, 0.1))
    noise = GradientNoise(*numbers(-1.0, 0.2, -0.3, -0.6))
    after = noise.judged(chosen, *numbers(0.5, math.inf), torch.tensor(False))
    after = after.stepped(chosen, torch.tensor(False))
    close(after, noise._replace(slope=torch.zeros((), dtype=torch.float64)))
    close(after.compared(torch.tensor(5.0).double()).share(), noise.share())
