"""``QuadraticModelOptions``: each number does what it says, and is checked."""

import dataclasses

import pytest
import torch

import lrkfac
from lrkfac import QuadraticModelOptions
from tests.transforms.test_base import close
from tests.transforms.test_quadratic_model import MLP, flat, make

INFINITY = float("inf")


def judged(tx, evaluate, state, share, statistics=True):
    """Updates and state after a step whose batch's loss changes by a share of what the model predicts."""
    e = evaluate(MLP.params, statistics=statistics)
    predicted = tx.update(e.grads, state, MLP.params, evaluation=e)[1].predicted if statistics else 0.0
    judge = e._replace(loss_at=lambda params: e.loss + share * predicted)
    return tx.update(e.grads, state, MLP.params, evaluation=judge)


def dampings(shares, **options):
    """``λ`` after steps with statistics, beside the first."""
    tx, evaluate = make(
        MLP, options=QuadraticModelOptions(**{"start_steps": 0.0, "damping_share": 0.0, **options}), damping=0.2
    )
    states = [tx.init(MLP.params)]
    for share in shares:
        states.append(judged(tx, evaluate, states[-1], share)[1])
    return [float(s.damping) / 0.2 for s in states[1:]], states[1:]


def test_the_defaults_are_those_of_every_figure():
    assert dataclasses.asdict(QuadraticModelOptions()) == {
        "damping_decay": 0.95, "max_steps": 20, "damping_interval": 1, "start_steps": 120.0, "start_decay": 0.5,
        "damping_share": 0.1, "min_damping": 1e-10, "max_damping": 1e8, "lower_threshold": 0.25,
        "upper_threshold": 0.75, "reject": True, "rejection_factor": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize("options, shares, expected", [
    ({}, (1.0, 0.5, 0.2, 0.2), (0.95, 0.95, 1, 1 / 0.95)),
    ({"damping_decay": 0.5}, (1.0, 0.5, 0.2, 0.2), (0.5, 0.5, 1, 2)),
    ({"damping_interval": 2}, (1.0, 1.0, 0.2, 0.2), (1, 0.95**2, 0.95**2, 1)),
    ({"damping_interval": 2}, (-1.0, 0.5), (4, 4)),
    ({"lower_threshold": 0.4}, (0.3, 0.5), (1 / 0.95, 1 / 0.95)),
    ({"upper_threshold": 0.4}, (0.3, 0.5), (1, 0.95)),
    ({"rejection_factor": 10.0}, (-1.0, -1.0), (10, 100)),
    ({"reject": False}, (-1.0, INFINITY), (1 / 0.95, 4 / 0.95)),
    ({"max_damping": 0.3}, (-1.0, -1.0), (1.5, 1.5)),
    ({"min_damping": 0.18}, (1.0, 1.0, 1.0, 1.0), (0.95, 0.95**2, 0.9, 0.9)),
    ({"start_steps": 10.0, "start_decay": 0.5}, (-1.0, -1.0), (4, 16)),
])  # fmt: skip
def test_the_damping_follows_the_reduction_ratio(options, shares, expected):
    close(torch.tensor(dampings(shares, **options)[0]), torch.tensor(expected, dtype=torch.float32), rtol=1e-5)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.999])
def test_a_damping_that_hardly_matters_falls_without_noise_alone(noisy, share):
    """Of 1e-6, beside the curvature of the batch; it rises in any case."""
    tx, evaluate = make(MLP, options=QuadraticModelOptions(start_steps=0.0, damping_share=share), damping=1e-6)
    state = tx.init(MLP.params)
    if noisy:
        state = state._replace(
            noise=state.noise._replace(slopes=torch.tensor(-1e6).double(), unseen=torch.tensor(-5e5).double())
        )
    for change, factor in ((1.0, 1.0 if noisy and share else 0.95), (0.2, 1 / 0.95)):
        after = judged(tx, evaluate, state, change)[1]
        close(after.damping / state.damping, torch.tensor(factor).double(), rtol=1e-5)


@pytest.mark.parametrize("option", ["min_damping", "max_damping"])
def test_both_dampings_stay_in_their_bounds(option):
    _, states = dampings([1.0] * 3, **{option: 0.2})
    for state in states:
        for damping in (state.damping, state.factor_damping):
            assert damping >= 0.2 - 1e-7 if option == "min_damping" else damping <= 0.2 + 1e-7


def test_a_start_outside_the_bounds_is_moved_within():
    tx, _ = make(MLP, options=QuadraticModelOptions(min_damping=0.5), damping=0.1)
    state = tx.init(MLP.params)
    assert state.damping == state.factor_damping == 0.5


@pytest.mark.parametrize("max_steps", [2, 20])
def test_a_change_makes_up_for_so_many_steps(max_steps):
    tx, evaluate = make(
        MLP, options=QuadraticModelOptions(start_steps=0.0, damping_share=0.0, max_steps=max_steps), damping=0.2
    )
    state = judged(tx, evaluate, tx.init(MLP.params), 0.5)[1]
    for _ in range(5):
        state = judged(tx, evaluate, state, 0.0, statistics=False)[1]
    after = judged(tx, evaluate, state, 1.0)[1]
    close(after.damping / state.damping, torch.tensor(0.95 ** min(6, max_steps)).double(), rtol=1e-6)


def test_the_first_changes_are_larger():
    """Those of both dampings, by factors that become smaller with each statistics."""
    for start, decay in ((0.0, 0.5), (40.0, 0.5), (40.0, 0.0)):
        options = QuadraticModelOptions(start_steps=start, start_decay=decay)
        tx, evaluate = make(MLP, options=options, damping=0.2)
        state, exponents = tx.init(MLP.params), []
        for _ in range(3):
            new = judged(tx, evaluate, state, 0.5)[1]
            ratio, of_model = new.factor_damping / state.factor_damping, new.damping / state.damping
            i = float(ratio.log().sign())
            extra = float(start * decay ** int(state.refreshes))
            close(ratio, torch.tensor(0.95 ** (-i * (1 + extra))).double(), rtol=1e-5)
            close(of_model, torch.tensor(0.95 ** (-i * extra)).double(), rtol=1e-5)
            exponents.append(i)
            state = new
        assert any(exponents)


def test_a_large_move_to_smaller_dampings_is_taken_back_after_a_poor_step():
    """With the step; the model chose it. A good step keeps both."""
    for share, kept in ((0.1, False), (-1.0, False), (0.5, True)):
        tx, evaluate = make(MLP, options=QuadraticModelOptions(start_steps=40.0), damping=10.0)
        updates, after = judged(tx, evaluate, tx.init(MLP.params), share)
        assert bool(flat(MLP, updates).any()) == kept and after.rejected == (not kept)
        expected = (10 * 0.95**40, 10 * 0.95**41) if kept else (10.0, 10.0)
        close((after.damping, after.factor_damping), tuple(torch.tensor(x).double() for x in expected), rtol=1e-5)


def test_without_rejection_a_worse_step_is_taken_but_none_that_is_not_finite():
    for reject, share, taken in ((True, -1.0, False), (False, -1.0, True), (False, INFINITY, False)):
        tx, evaluate = make(MLP, options=QuadraticModelOptions(reject=reject))
        updates, state = judged(tx, evaluate, tx.init(MLP.params), share)
        assert bool(flat(MLP, updates).any()) == taken and state.rejected == (not taken)


def test_a_run_forgets_where_its_dampings_started():
    """Over five orders of magnitude; without larger changes at the start, the largest is where it was."""

    def trained(damping, start_steps):
        tx, evaluate = make(MLP, options=QuadraticModelOptions(start_steps=start_steps), damping=damping)
        params, state = MLP.params, tx.init(MLP.params)
        for _ in range(20):
            e = evaluate(params)
            updates, state = tx.update(e.grads, state, params, evaluation=e)
            params = lrkfac.apply_updates(params, updates)
        return float(state.damping), float(e.loss_at(params))

    for damping in (1e-4, 1e-2, 1.0, 10.0):
        after, loss = trained(damping, QuadraticModelOptions().start_steps)
        assert after < 0.1 and loss < 0.02
    after, loss = trained(10.0, 0.0)
    assert after > 3 and loss > 0.5


def test_the_chain_hands_its_options_on():
    layers = lrkfac.find_layers(MLP.model, MLP.params, MLP.inputs)
    tx = lrkfac.adaptive_low_rank_kfac(layers, damping=0.1, options=QuadraticModelOptions(max_damping=0.01))
    assert tx.init(MLP.params)[0].damping == 0.01


@pytest.mark.parametrize("wrong", [None, {}, 0.95, QuadraticModelOptions])
def test_other_options_are_refused(wrong):
    with pytest.raises(TypeError, match="options: expected QuadraticModelOptions"):
        make(MLP, options=wrong)


@pytest.mark.parametrize("wrong", [
    {"damping_decay": 1.0}, {"damping_decay": 0.0}, {"max_steps": 0}, {"damping_interval": 0}, {"start_steps": -1.0},
    {"start_decay": 1.0}, {"min_damping": 0.0}, {"max_damping": 1e-10}, {"upper_threshold": 0.25},
    {"rejection_factor": 1.0},
])  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QuadraticModelOptions(**wrong)
