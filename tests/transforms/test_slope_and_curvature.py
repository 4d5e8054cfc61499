"""``scale_by_slope_and_curvature``: its definition in plain numbers, what it rests at, what it does not depend on."""

import math

import optree
import pytest
import torch

import lrkfac
from lrkfac import scale_by_slope_and_curvature
from lrkfac.transforms.slope_and_curvature import AVERAGED, BEYOND, FASTEST, LOWERED, MOST, OUTLIER, OVER_RELAXED
from tests import cases
from tests.transforms.test_base import close, trained
from tests.transforms.test_precondition import cast, layers_and_evaluate

MLP = cases.LINEAR[0]


def quadratic(matrix, noise=0.0, seed=0):
    """``evaluate(params, statistics)`` of ``(params - 1)ᵀ H (params - 1) / 2`` with noise in the gradient."""
    generator = torch.Generator().manual_seed(seed)

    def gram(*trees):
        stacked = torch.stack([tree["w"] for tree in trees])
        return stacked @ matrix @ stacked.mT

    def evaluate(params, statistics=True):
        apart = params["w"] - 1
        error = noise * torch.randn(len(apart), generator=generator, dtype=apart.dtype)
        e = lrkfac.Evaluation(*[None] * len(lrkfac.Evaluation._fields))
        grads = {"w": matrix @ apart + error}
        return e._replace(
            loss=apart @ matrix @ apart / 2, grads=grads, gram=gram, statistics=() if statistics else None
        )

    return evaluate


def steps(tx, evaluate, number, params=None, every=1, direction=lambda gradient: gradient):
    """The state after each step, and the parameters."""
    params = {"w": torch.zeros(4, dtype=torch.float64)} if params is None else params
    state = tx.init(params)
    for i in range(number):
        e = evaluate(params, i % every == 0)
        updates, state = tx.update(direction(e.grads), state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        yield state, params


def clamp(x, low, high):
    return max(low, min(high, x))


def by_definition(evaluate, params, number, every, start):
    """The documented rule on one vector, number by number: yields the rate, the length and the parameters."""
    rate = length = slope = curvature = promised = size = expected = along_last = along_next = 0.0
    last = torch.zeros_like(params)
    for i in range(number):
        e = evaluate({"w": params}, i % every == 0)
        u = e.grads["w"]
        if i % every == 0:
            along_next = float(e.gram({"w": u}, {"w": u})[0, 0])
            along_last = float(e.gram({"w": last}, {"w": last})[0, 0]) / length**2 if length else along_next
        if length:
            found = [-float(last @ u), along_last * length**2, expected]
            total = sum(map(abs, found))
            cut = min(1, OUTLIER * size / total) if size else 1
            new = [cut * x for x in (*found, total)]
            old = (slope, curvature, promised, size)
            slope, curvature, promised, size = (
                AVERAGED * a + (1 - AVERAGED) * b for a, b in zip(old, new, strict=True)
            )
        if rate:
            relaxed = min(OVER_RELAXED * max(0.0, (slope + curvature) / promised) ** 2, MOST)
            excess = clamp(slope / curvature + relaxed, -1, 1)
            rate *= math.exp(FASTEST * excess * math.sqrt(abs(excess)))
        else:
            rate = start / math.sqrt(float(u.square().mean()))
        bound = BEYOND * float(u @ u) / along_next
        rate = min(rate, max(bound, rate * math.exp(-FASTEST)))
        length = min(rate, bound)
        expected, last = length * float(u @ u), -length * u
        params = params + last
        yield rate, length, params


@pytest.mark.parametrize("every", [1, 3])
def test_is_its_definition(every):
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64))
    start = torch.zeros(4, dtype=torch.float64)
    expected = by_definition(quadratic(matrix, 0.3), start, 120, every, 0.02)
    found = steps(scale_by_slope_and_curvature(0.02), quadratic(matrix, 0.3), 120, every=every)
    for (state, params), (rate, length, point) in zip(found, expected, strict=True):
        assert math.isclose(float(state.rate), rate, rel_tol=1e-9)
        assert math.isclose(float(state.length), length, rel_tol=1e-9)
        close(params["w"], point, 1e-9)


@pytest.mark.parametrize("start", [1e-4, 1.0])
def test_without_noise_finds_the_inverse_curvature(start):
    """All curvatures are one: from below it ends there, from above the batch's own model brings it near at once."""
    matrix = 5 * torch.eye(4, dtype=torch.float64)
    pairs = list(steps(scale_by_slope_and_curvature(start), quadratic(matrix), 150))
    apart = [1.0, *[float((params["w"] - 1).norm()) for _, params in pairs]]
    lengths = [float(state.length) for (state, _), distance in zip(pairs, apart, strict=False) if distance > 1e-6]
    assert 0.98 / 5 < lengths[-1] and max(lengths) <= BEYOND / 5 + 1e-9
    assert apart[-1] < 1e-9


def of_one_length(gradient):
    return {"w": gradient["w"] / gradient["w"].norm().clamp(min=1e-300)}


def test_along_a_direction_of_one_length_converges_linearly():
    """The rate must fall as fast as the distance does."""
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.5], dtype=torch.float64))
    found = steps(scale_by_slope_and_curvature(), quadratic(matrix), 200, direction=of_one_length)
    distances = [float((params["w"] - 1).norm()) for _, params in found]
    assert distances[100] < 1e-3 and distances[-1] < 1e-3 * distances[100]


@pytest.mark.parametrize("noise", [3.0])
def test_noise_shortens_steps(noise):
    """Where two batches do not agree, the rate rests below the inverse curvature, and near the minimum it falls on."""
    matrix = 5 * torch.eye(4, dtype=torch.float64)
    rates = [float(state.rate) for state, _ in steps(scale_by_slope_and_curvature(), quadratic(matrix, noise), 600)]
    assert max(rates[300:]) < 0.5 / 5 and sum(rates[500:]) < 0.5 * sum(rates[100:200])


@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_the_unit_of_the_direction_does_not_matter(unit):
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64))
    link = scale_by_slope_and_curvature()
    pairs = zip(
        steps(link, quadratic(matrix, 0.3), 100),
        steps(lrkfac.chain(lrkfac.scale(unit), link), quadratic(matrix, 0.3), 100),
        strict=True,
    )
    for (state, params), ((_, other), same) in pairs:
        close(params["w"], same["w"], 1e-9)
        assert math.isclose(float(state.rate), unit * float(other.rate), rel_tol=1e-9)


@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_the_unit_of_the_loss_does_not_matter(unit):
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64))
    original = quadratic(matrix, 0.3)

    def evaluate(params, statistics):
        e = original(params, statistics)
        grads = {"w": unit * e.grads["w"]}
        return e._replace(loss=unit * e.loss, grads=grads, gram=lambda *trees: unit * e.gram(*trees))

    link = scale_by_slope_and_curvature()
    for one, other in zip(steps(link, quadratic(matrix, 0.3), 100), steps(link, evaluate, 100), strict=True):
        close(one[1]["w"], other[1]["w"], 1e-9)


def bad(e):
    return e._replace(loss=torch.full_like(e.loss, torch.nan), grads=optree.tree_map(lambda g: g + torch.nan, e.grads))


@pytest.mark.parametrize("statistics", [True, False])
def test_one_bad_batch_changes_nothing_and_the_second_takes_the_last_step_back(statistics):
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64))
    tx, evaluate = scale_by_slope_and_curvature(), quadratic(matrix, 0.3)
    *_, (_, before), (state, params) = steps(tx, evaluate, 20)
    e = bad(evaluate(params, statistics))
    updates, once = tx.update(e.grads, state, params, evaluation=e)
    assert float(updates["w"].abs().max()) == 0 and int(once.failures) == 1
    close(once._replace(failures=state.failures), state, 0)
    updates, twice = tx.update(e.grads, once, params, evaluation=e)
    close(lrkfac.apply_updates(params, updates), before, 1e-12)
    assert int(twice.rejected) == 1 and float(twice.rate) == LOWERED * float(state.rate)
    updates, thrice = tx.update(e.grads, twice, params, evaluation=e)
    assert float(updates["w"].abs().max()) == 0 and int(thrice.rejected) == 1
    e = evaluate(before, statistics)
    _, after = tx.update(e.grads, thrice, before, evaluation=e)
    assert int(after.failures) == 0 and all(bool(torch.isfinite(x).all()) for x in optree.tree_leaves(after))
    close([getattr(after, n) for n in ("slope", "curvature")], [getattr(state, n) for n in ("slope", "curvature")], 0)


@pytest.mark.parametrize("factor", [1e6, 1e-6, 0.0])
def test_one_batch_of_another_scale_changes_the_rate_little(factor):
    matrix = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64))
    tx, evaluate = scale_by_slope_and_curvature(), quadratic(matrix, 3.0)
    *_, (state, params) = steps(tx, evaluate, 200, direction=of_one_length)
    e = evaluate(params)
    e = e._replace(loss=factor * e.loss, grads=optree.tree_map(lambda g: factor * g, e.grads))
    _, after = tx.update(of_one_length(e.grads), state, params, evaluation=e)
    for _ in range(20):
        e = evaluate(params)
        _, after = tx.update(of_one_length(e.grads), after, params, evaluation=e)
    assert 0.2 < float(after.rate) / float(state.rate) < 5


def test_zero_gradients_leave_rate_and_bounds():
    matrix = torch.eye(4, dtype=torch.float64)
    tx, zero = scale_by_slope_and_curvature(), {"w": torch.zeros(4, dtype=torch.float64)}
    *_, (state, params) = steps(tx, quadratic(matrix, 0.1), 20)
    e = quadratic(matrix)(params)._replace(grads=zero)
    updates, after = tx.update(zero, state, params, evaluation=e)
    assert float(updates["w"].abs().max()) == 0 == float(after.length)
    assert float(after.along_next) == float(state.along_next)
    first = tx.update(zero, tx.init(params), params, evaluation=e)[1]
    assert float(first.rate) == 0  # to be found by the first direction
    assert all(bool(torch.isfinite(x).all()) for x in optree.tree_leaves((after, first)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chain_without_a_rate_learns(dtype):
    case = cast(MLP, dtype)
    layers, evaluate = layers_and_evaluate(case)
    losses = [
        float(step.evaluation.loss) for step in trained(lrkfac.spectral_kfac(layers, rank=2), case.params, evaluate, 40)
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="start: expected a finite number"):
        scale_by_slope_and_curvature(0.0)
    evaluate = layers_and_evaluate(MLP)[1]
    tx = scale_by_slope_and_curvature()
    grads = evaluate(MLP.params).grads
    with pytest.raises(TypeError, match="evaluation is missing"):
        tx.update(grads, tx.init(MLP.params), MLP.params)
    with pytest.raises(ValueError, match="expected a SlopeAndCurvatureState"):
        tx.update(grads, (), MLP.params, evaluation=evaluate(MLP.params))
    with pytest.raises(ValueError, match="updates beside params: the tree differs"):
        tx.update({}, tx.init(MLP.params), MLP.params, evaluation=evaluate(MLP.params))


def test_the_rate_stays_while_there_is_no_step():
    """Along directions of ascent, as after a batch of another scale, whatever the last averages say."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    tx, evaluate = scale_by_slope_and_curvature(start=1e3), quadratic(matrix)
    *_, (state, params) = steps(tx, evaluate, 3)
    rates = []
    for _ in range(40):
        e = evaluate(params)
        updates, state = tx.update({"w": -e.grads["w"]}, state, params, evaluation=e)
        assert state.length == 0 and not updates["w"].any()
        rates.append(float(state.rate))
    assert rates[-1] == rates[1] > 1
