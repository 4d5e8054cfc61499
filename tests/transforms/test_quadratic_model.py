"""``scale_by_quadratic_model``: what it chooses minimises the explicit model; bad steps and batches change nothing."""

from typing import NamedTuple

import optree
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import precondition_by_fisher, scale_by_quadratic_model
from lrkfac.structures import dense, kronecker, low_rank
from tests import cases, reference_networks
from tests.described import layers_of
from tests.transforms.test_base import close, trained
from tests.transforms.test_precondition import cast, layers_and_evaluate

MLP, GAUSSIAN, SHIFT, STRIDE = cases.LINEAR[0], cases.LINEAR[1], cases.LINEAR[6], cases.CONVOLUTION[0]
DENSE = kronecker(dense(), dense())


class Plain(NamedTuple):
    """The state of what passes for a preconditioner, and leaves gradients as they are."""

    @property
    def preconditions(self):
        return True


def flat(case, tree):
    return torch.cat([tree[name].flatten() for name in case.params])


def row(case, last):
    """The one row of a state, whose leaves are small and sorted by name, in the order of ``flat``."""
    names, (last,) = sorted(case.params), last
    parts = dict(zip(names, last.split([case.params[name].numel() for name in names]), strict=True))
    return torch.cat([parts[name] for name in case.params])


STEADY = lrkfac.QuadraticModelOptions(start_steps=0.0)


def make(case, structure=DENSE, options=STEADY, **arguments):
    """With small changes of the dampings from the start, unless other options are given."""
    layers, evaluate = layers_and_evaluate(case)
    preconditioner = precondition_by_fisher(layers, structure, decay=0.8)
    return scale_by_quadratic_model(preconditioner, options=options, **arguments), evaluate


def run(tx, case, evaluate, number, every=2):
    """Each step's parameters, the state before it, the evaluation, the updates and the state after it."""
    before = case.params, tx.init(case.params)
    for e, updates, state, params in trained(tx, case.params, evaluate, number, every):
        yield (*before, e, updates, state)
        before = params, state


def model_of(case, params, damping, decay):
    at = case._replace(params=params)
    matrix = reference_networks.gauss_newton_matrix(at)
    each = flat(case, {name: torch.full_like(p, decay[name]) for name, p in params.items()})
    slope = flat(case, reference_networks.gradients(at)) + each * flat(case, params)
    return matrix + torch.diag(damping + each), slope


@pytest.mark.parametrize("case, weight_decay", [(MLP, 0.0), (GAUSSIAN, "each"), (SHIFT, 0.3), (STRIDE, "each")])
def test_each_step_minimises_the_explicit_model(case, weight_decay):
    """At refreshes over both directions, between them over one: the candidate, coefficients, value; the ratio."""
    decay = {name: 0.2 * i if weight_decay == "each" else weight_decay for i, name in enumerate(case.params)}
    options = lrkfac.QuadraticModelOptions(start_steps=3.0, start_decay=0.5)
    penalty = decay if weight_decay == "each" else weight_decay
    tx, evaluate = make(case, weight_decay=penalty, damping=0.5, options=options)
    for params, old, e, updates, new in run(tx, case, evaluate, 6):
        undamped, slope = model_of(case, params, 0.0, decay)
        grads = {name: g + decay[name] * params[name] for name, g in e.grads.items()}
        span, start = 0.95 ** (int(old.since) + 1), 0.95 ** (3 * 0.5 ** int(old.refreshes))
        last, candidates = row(case, old.last), []
        for i in (-1, 0, 1) if e.statistics else (0,):
            damping, of_model = old.factor_damping * (span * start) ** i, old.damping * start**i
            matrix = undamped + of_model * torch.eye(len(slope), dtype=slope.dtype)
            pre = precondition_by_fisher(layers_and_evaluate(case)[0], DENSE, damping=float(damping), decay=0.8)
            found, _ = pre.update(grads, old.preconditioner, params, evaluation=e)
            columns = -flat(case, found)[:, None]
            if last.norm() > 0:
                columns = torch.cat([columns, last[:, None]], dim=1)
            # Between refreshes, one direction: in the proportion of the last step.
            proportion = torch.stack([old.learning_rate, old.momentum])[: columns.shape[1], None]
            basis = torch.eye(len(proportion), dtype=slope.dtype) if e.statistics else proportion
            along = columns @ basis
            x = basis @ torch.linalg.solve(along.mT @ matrix @ along, -along.mT @ slope)
            step = columns @ x
            candidates.append((0.5 * step @ matrix @ step + slope @ step, step, x, damping, of_model, i))
        value, step, x, damping, of_model, i = min(candidates, key=lambda candidate: candidate[0])
        close(flat(case, updates), step, rtol=1e-5, atol=1e-8)
        close(new.predicted, value, rtol=1e-8)
        close(new.learning_rate, x[0], rtol=1e-5)
        close(new.momentum, x[1] if len(x) > 1 else torch.zeros_like(x[0]), rtol=1e-5, atol=1e-8)
        assert new.rejected == 0 and new.failures == 0 and new.since == (0 if e.statistics else old.since + 1)
        assert new.refreshes == old.refreshes + (e.statistics is not None)
        if not e.statistics:
            kept = "damping", "factor_damping", "reduction_ratio"
            close([getattr(new, name) for name in kept], [getattr(old, name) for name in kept], rtol=0, atol=0)
            continue
        h = [
            reference_networks.loss(case._replace(params=p)) + sum(decay[n] * p[n].square().sum() for n in p) / 2
            for p in (params, lrkfac.apply_updates(params, updates))
        ]
        ratio = (h[1] - h[0]) / value
        close(new.reduction_ratio, ratio, rtol=1e-6)
        factor = span if ratio > 0.75 else 1 / span if ratio < 0.25 else 1.0
        close((new.damping, new.factor_damping), (of_model * factor, torch.as_tensor(damping)))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing(statistics, bad):
    tx, evaluate = make(GAUSSIAN, kronecker(low_rank(2), dense()))
    *_, (_, _, _, updates, state) = run(tx, GAUSSIAN, evaluate, 2)
    inputs = GAUSSIAN.inputs.clone()
    inputs[0, 0] = bad
    e = layers_and_evaluate(GAUSSIAN._replace(inputs=inputs))[1](GAUSSIAN.params, statistics=statistics)
    assert not e.grads["0.weight"].isfinite().all()
    updates, new = tx.update(e.grads, state, GAUSSIAN.params, evaluation=e)
    assert new.failures == 1
    close((updates, new._replace(failures=state.failures)), (optree.tree_map(torch.zeros_like, updates), state),
          rtol=0, atol=0)  # fmt: skip


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e17), (torch.float32, 3e38), (torch.float64, 1e155)])
def test_a_gradient_whose_square_is_not_finite_changes_nothing(dtype, size, statistics):
    """Nor does it stay in the sum of gradients, which would take hundreds of steps to forget it."""
    case = cast(MLP, dtype)
    tx, evaluate = make(case, kronecker(low_rank(2), dense()), gradient_decay=0.6)
    *_, (_, _, _, updates, state) = run(tx, case, evaluate, 2)
    e = evaluate(case.params, statistics=statistics)
    large = {name: torch.full_like(g, size) for name, g in e.grads.items()}
    updates, new = tx.update(large, state, case.params, evaluation=e)
    close((updates, new._replace(failures=state.failures)), (optree.tree_map(torch.zeros_like, updates), state),
          rtol=0, atol=0)  # fmt: skip
    updates, after = tx.update(e.grads, new, case.params, evaluation=e)
    assert new.failures == 1 and after.failures == 0
    assert flat(case, updates).abs().amax() > 0 and all(row.isfinite().all() for row in after.total)


def test_a_step_that_raises_the_loss_is_undone():
    tx, evaluate = make(MLP)
    state, e = tx.init(MLP.params), evaluate(MLP.params)
    for worse in (e.loss + 1, e.loss * float("nan"), e.loss * float("inf")):
        updates, new = tx.update(e.grads, state, MLP.params, evaluation=e._replace(loss_at=lambda p, x=worse: x))
        close(updates, optree.tree_map(torch.zeros_like, updates), rtol=0, atol=0)
        close(new.last, optree.tree_map(torch.zeros_like, new.last), rtol=0, atol=0)
        close(new.damping, 4 * state.damping)
        assert new.rejected == state.rejected + 1


def test_a_step_without_statistics_looks_at_no_loss_and_is_taken_back_when_two_evaluations_fail():
    """One failure may be the batch's, the second is blamed on the step; nothing is taken back twice."""
    tx, evaluate = make(MLP)
    steps = [*run(tx, MLP, evaluate, 2)]
    looked, (params, old, *_) = steps[0][-1], steps[1]
    e = evaluate(params, statistics=False)
    updates, state = tx.update(e.grads, old, params, evaluation=e._replace(loss_at=None))
    failing = e._replace(loss=e.loss * float("inf"))
    zeros = optree.tree_map(torch.zeros_like, updates)
    for expected, damping, rejected in (
        (zeros, state.damping, 0),
        (optree.tree_map(torch.neg, updates), 4 * state.damping, 1),
        (zeros, 4 * state.damping, 1),
    ):
        back, after = tx.update(e.grads, state, params, evaluation=failing)
        close((back, after.damping, after.rejected), (expected, damping, torch.tensor(rejected)), rtol=0, atol=0)
        state = after
    back, after = tx.update(e.grads, state, params, evaluation=e)
    assert after.failures == 0 and after.rejected == 1 and flat(MLP, back).any()
    for _ in range(3):  # a step that was looked at stays
        back, looked = tx.update(e.grads, looked, params, evaluation=failing)
        close(back, zeros, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_taken(bad):
    """Without a look at the loss: where the preconditioner or the batch's curvature overflows."""
    plain = lrkfac.GradientTransformation(lambda params: Plain(), lambda u, state, *args, **extra: (u, state))
    blown = plain._replace(update=lambda u, state, *args, **extra: (optree.tree_map(lambda x: bad * x, u), state))
    _, evaluate = make(MLP)
    e = evaluate(MLP.params, statistics=False)
    for inner, evaluation in ((blown, e), (plain, e._replace(gram=lambda *tangents: bad * e.gram(*tangents)))):
        tx = scale_by_quadratic_model(inner)
        updates, state = tx.update(e.grads, tx.init(MLP.params), MLP.params, evaluation=evaluation)
        close(updates, optree.tree_map(torch.zeros_like, updates), rtol=0, atol=0)
        close(state.last, optree.tree_map(torch.zeros_like, state.last), rtol=0, atol=0)
        assert state.rejected == 1 and state.damping == 4 * 0.1
        assert all(x.isfinite().all() for x in optree.tree_leaves(state.total))


def test_a_zero_gradient_stays():
    """Nothing to do and nothing divided by: all targets met exactly."""
    case = GAUSSIAN._replace(targets=GAUSSIAN.model(GAUSSIAN.params, GAUSSIAN.inputs))
    tx, evaluate = make(case)
    for _, _, _, updates, new in run(tx, case, evaluate, 3):
        close(updates, optree.tree_map(torch.zeros_like, updates), rtol=0, atol=1e-12)
        assert all(x.isfinite().all() for x in optree.tree_leaves(new))


IN_FLOAT32 = [cast(case, torch.float32) for case in (MLP, GAUSSIAN, STRIDE)]


@pytest.mark.slow
@settings(max_examples=20)
# A batch without loss, hence no last update at the next.
@example(seed=116, rank=1, batch=1, damping=1e-3, case=IN_FLOAT32[0])
@given(
    *[st.integers(0, 1000), st.integers(1, 6), st.integers(1, 7)],
    *[st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from(IN_FLOAT32)],
)
def test_no_run_diverges_in_float32(seed, rank, batch, damping, case):
    """From parameters of any scale; each step with statistics lowers its own batch's loss or is undone."""
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** float(2 * torch.rand((), generator=g) - 1)
    params = optree.tree_map(lambda p: scale * p, case.params)
    layers = layers_of(case)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    f = lrkfac.evaluator(case.model, likelihood, layers, "mc")
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=rank, dense_up_to=0, damping=damping)
    state = tx.init(params)
    for i in range(8):
        chosen = torch.randint(len(case.inputs), (batch,), generator=g)
        x, y = case.inputs[chosen], case.targets[chosen]
        noise = torch.rand((1, *case.model(params, x).shape), generator=g)
        e = f(params, x, y, statistics=i % 3 == 0, noise=noise if i % 3 == 0 else None)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        assert i % 3 or e.loss_at(params) <= e.loss + 1e-4 * e.loss.abs()
        assert all(p.isfinite().all() for p in optree.tree_leaves((params, state)))


def test_it_is_written_for_preconditioners_in_chains():
    layers, evaluate = layers_and_evaluate(MLP)
    plain = precondition_by_fisher(layers, DENSE)
    both = (scale_by_quadratic_model(inner) for inner in (lrkfac.chain(plain, lrkfac.scale(2.0)), plain))
    close(*[trained(tx, MLP.params, evaluate, 1)[0].updates for tx in both], rtol=1e-8)


@pytest.mark.parametrize("inner", [lrkfac.identity(), lrkfac.chain(lrkfac.scale(1.0), lrkfac.trace(0.9))])
def test_a_transformation_that_does_not_precondition_is_refused(inner):
    with pytest.raises(ValueError, match="nothing in it preconditions"):
        scale_by_quadratic_model(inner).init(MLP.params)


def test_an_operation_without_forward_derivative_is_named():
    model = lambda params, x: torch.cdist(x @ params["w"], x)  # noqa: E731
    params, x = {"w": torch.randn(3, 3)}, torch.randn(5, 3)
    layers = lrkfac.find_layers(model, params, x)
    e = lrkfac.evaluator(model, lrkfac.gaussian(), layers)(params, x, torch.zeros(5, 5))
    tx = lrkfac.adaptive_low_rank_kfac(layers)
    with pytest.raises(NotImplementedError, match=r"no forward derivative.*_cdist_forward"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)
