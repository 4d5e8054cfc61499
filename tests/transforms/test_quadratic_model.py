"""``scale_by_quadratic_model``: what it chooses minimises the explicit model; bad steps and batches change nothing."""

import copy
import pickle
from typing import NamedTuple

import optree
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import vmap

import lrkfac
from lrkfac import precondition_by_fisher, scale_by_quadratic_model
from lrkfac.structures import dense, kronecker
from lrkfac.transforms.base import GradientTransformation
from lrkfac.transforms.quadratic_model import ADAPTATION, RAISED
from tests import cases, reference_networks
from tests.compiling import traced
from tests.transforms.test_base import close
from tests.transforms.test_precondition import cast, layers_and_evaluate

MLP, GAUSSIAN, SHIFT, STRIDE = cases.LINEAR[0], cases.LINEAR[1], cases.LINEAR[6], cases.CONVOLUTION[0]
DENSE = kronecker(dense(), dense())
some_cases = pytest.mark.parametrize("case", [MLP, GAUSSIAN, SHIFT, STRIDE], ids=lambda case: case.name)


def flat(case, tree):
    return torch.cat([tree[name].flatten() for name in case.params])


def row(case, last):
    """The row of a state, whose leaves are sorted by name, in the order of ``flat``."""
    names = sorted(case.params)
    parts = dict(zip(names, last.split([case.params[name].numel() for name in names]), strict=True))
    return torch.cat([parts[name] for name in case.params])


def make(case, structure=DENSE, **options):
    layers, evaluate = layers_and_evaluate(case)
    return scale_by_quadratic_model(precondition_by_fisher(layers, structure, decay=0.8), **options), evaluate


def run(tx, case, evaluate, steps, every=2):
    """The states and evaluations of some steps, each at the parameters that the ones before led to."""
    params, state = case.params, tx.init(case.params)
    for i in range(steps):
        e = evaluate(params, statistics=i % every == 0)
        updates, new = tx.update(e.grads, state, params, evaluation=e)
        yield params, state, e, updates, new
        params, state = lrkfac.apply_updates(params, updates), new


def model_of(case, params, damping, decay):
    """The matrix and the slope of the quadratic model, formed."""
    at = case._replace(params=params)
    matrix = reference_networks.gauss_newton_matrix(at)
    each = flat(case, {name: torch.full_like(p, decay[name]) for name, p in params.items()})
    slope = flat(case, reference_networks.gradients(at)) + each * flat(case, params)
    return matrix + torch.diag(damping + each), slope


@some_cases
@pytest.mark.parametrize("weight_decay", [0.0, 0.3, "each"])
def test_each_step_minimises_the_explicit_model(case, weight_decay):
    """Over refreshes and steps between them: the candidate, both coefficients, the value and the ratio."""
    decay = {name: 0.2 * i if weight_decay == "each" else weight_decay for i, name in enumerate(case.params)}
    tx, evaluate = make(case, weight_decay=decay if weight_decay == "each" else weight_decay, damping=0.5)
    for params, old, e, updates, new in run(tx, case, evaluate, 6):
        matrix, slope = model_of(case, params, old.damping, decay)
        grads = {name: g + decay[name] * params[name] for name, g in e.grads.items()}
        span = ADAPTATION ** (int(old.since) + 1)
        tried = [old.factor_damping / span, old.factor_damping, old.factor_damping * span]
        last = row(case, old.last)
        best = None
        for damping in tried if e.statistics else [old.factor_damping]:
            found, _ = evaluate_preconditioner(case, old, e, grads, params, damping)
            columns = -flat(case, found)[:, None]
            if last.norm() > 0:
                columns = torch.cat([columns, last[:, None]], dim=1)
            x = torch.linalg.solve(columns.mT @ matrix @ columns, -columns.mT @ slope)
            step = columns @ x
            value = 0.5 * step @ matrix @ step + slope @ step
            if best is None or value < best[0]:
                best = value, step, x, damping
        value, step, x, damping = best
        close(flat(case, updates), step, rtol=1e-5, atol=1e-8)
        close(new.predicted, value, rtol=1e-8)
        close(new.learning_rate, x[0], rtol=1e-5)
        close(new.momentum, x[1] if len(x) > 1 else torch.zeros_like(x[0]), rtol=1e-5, atol=1e-8)
        close(new.factor_damping, torch.as_tensor(damping))
        h = [
            reference_networks.loss(case._replace(params=p))
            + 0.5 * sum(decay[n] * x.square().sum() for n, x in p.items())
            for p in (params, lrkfac.apply_updates(params, updates))
        ]
        ratio = (h[1] - h[0]) / value
        close(new.reduction_ratio, ratio, rtol=1e-6)
        factor = ADAPTATION if ratio > 0.75 else 1 / ADAPTATION if ratio < 0.25 else 1.0
        close(new.damping, old.damping * factor)
        assert new.rejected == 0 and new.since == (0 if e.statistics else old.since + 1)


def evaluate_preconditioner(case, state, e, grads, params, damping):
    layers, _ = layers_and_evaluate(case)
    pre = precondition_by_fisher(layers, DENSE, damping=float(damping), decay=0.8)
    return pre.update(grads, state.preconditioner, params, evaluation=e)


def test_a_quadratic_loss_is_solved_in_one_step():
    """A linear model with squared loss and the exact block, damped by next to nothing, is Newton's method."""
    case = cases.make_case("linear", (cases.linear(4, 3),), (9, 4), "gaussian", 1, variance=0.5)
    tx, evaluate = make(case, lrkfac.structures.full(), damping=1e-10)
    (_, _, _, updates, state) = next(iter(run(tx, case, evaluate, 1)))
    rows = torch.cat([case.inputs, torch.ones(9, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(rows, case.targets).solution
    reached = lrkfac.apply_updates(case.params, updates)
    close(torch.cat([reached["0.weight"], reached["0.bias"][:, None]], dim=1), solution.mT, rtol=1e-6)
    close(state.reduction_ratio, torch.ones_like(state.reduction_ratio), rtol=1e-6)


@some_cases
def test_laws(case):
    """Pure, a state of constant form, and a map over an ensemble equals a loop."""
    tx, evaluate = make(case, kronecker(lrkfac.structures.low_rank(2), lrkfac.structures.low_rank_plus_diagonal(2)))
    before = optree.tree_map(torch.clone, case.params)
    for params, old, e, updates, new in run(tx, case, evaluate, 3):
        before_update = optree.tree_map(torch.clone, (params, old, e.grads))
        tx.update(e.grads, old, params, evaluation=e)
        close((params, old, e.grads), before_update, rtol=0, atol=0)
        assert optree.tree_structure(new) == optree.tree_structure(old)
        for x, y in zip(optree.tree_leaves(new), optree.tree_leaves(old), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
        assert optree.tree_structure(updates) == optree.tree_structure(params)
    close(case.params, before, rtol=0, atol=0)
    shifts = [0.0, 0.1, -0.2]
    members = [optree.tree_map(lambda x, s=s: x + s, case.params) for s in shifts]
    stacked = optree.tree_map(lambda *x: torch.stack(x), *members)

    def two_steps(params):
        state = tx.init(params)
        for i in range(2):
            e = evaluate(params, statistics=i == 0)
            updates, state = tx.update(e.grads, state, params, evaluation=e)
            params = lrkfac.apply_updates(params, updates)
        return params

    mapped = vmap(two_steps)(stacked)
    for i, member in enumerate(members):
        close(optree.tree_map(lambda x, i=i: x[i], mapped), two_steps(member), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "structure", [DENSE, kronecker(lrkfac.structures.low_rank(2), lrkfac.structures.low_rank_plus_diagonal(2))]
)
def test_a_batch_that_is_not_finite_changes_nothing(statistics, bad, structure):
    layers, evaluate = layers_and_evaluate(GAUSSIAN)
    tx = scale_by_quadratic_model(precondition_by_fisher(layers, structure))
    *_, (_, _, _, updates, state) = run(tx, GAUSSIAN, evaluate, 2)
    f = lrkfac.evaluator(GAUSSIAN.model, lrkfac.gaussian(0.25), layers, "exact")
    inputs = GAUSSIAN.inputs.clone()
    inputs[0, 0] = bad
    e = f(GAUSSIAN.params, inputs, GAUSSIAN.targets, statistics=statistics)
    assert not e.grads["0.weight"].isfinite().all()
    updates, new = tx.update(e.grads, state, GAUSSIAN.params, evaluation=e)
    zero = optree.tree_map(torch.zeros_like, updates)
    close(updates, zero, rtol=0, atol=0)
    close(new, state, rtol=0, atol=0)


def test_a_step_that_raises_the_loss_is_undone():
    tx, evaluate = make(MLP)
    state, e = tx.init(MLP.params), evaluate(MLP.params)
    for worse in (e.loss + 1, e.loss * float("nan"), e.loss * float("inf")):
        updates, new = tx.update(e.grads, state, MLP.params, evaluation=e._replace(loss_at=lambda p, x=worse: x))
        close(updates, optree.tree_map(torch.zeros_like, updates), rtol=0, atol=0)
        close(new.last, torch.zeros_like(new.last), rtol=0, atol=0)
        close(new.damping, RAISED * state.damping)
        assert new.rejected == state.rejected + 1


def test_copies_step_alike():
    tx, evaluate = make(MLP, weight_decay=0.1, gradient_decay=0.5, kl_clip=1e-3)
    e = evaluate(MLP.params)
    expected = tx.update(e.grads, tx.init(MLP.params), MLP.params, evaluation=e)
    for copied in (copy.deepcopy(tx), pickle.loads(pickle.dumps(tx))):
        close(copied.update(e.grads, copied.init(MLP.params), MLP.params, evaluation=e), expected, rtol=0, atol=0)


def test_a_zero_gradient_stays():
    """Nothing to do and nothing divided by: all targets met exactly."""
    case = GAUSSIAN._replace(targets=GAUSSIAN.model(GAUSSIAN.params, GAUSSIAN.inputs))
    tx, evaluate = make(case)
    for _, _, _, updates, new in run(tx, case, evaluate, 3):
        close(updates, optree.tree_map(torch.zeros_like, updates), rtol=0, atol=1e-12)
        assert all(x.isfinite().all() for x in optree.tree_leaves(new))


@settings(max_examples=20)
@example(seed=116, rank=1, batch=1, damping=1e-3, case=MLP)  # a batch without loss, hence no last update at the next
@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([MLP, GAUSSIAN, STRIDE]),
)
def test_no_run_diverges_in_float32(seed, rank, batch, damping, case):
    """From parameters of any scale; each step lowers its own batch's loss or is undone."""
    case = cast(case, torch.float32)
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** float(2 * torch.rand((), generator=g) - 1)
    params = optree.tree_map(lambda p: scale * p, case.params)
    layers = lrkfac.find_layers(case.model, case.params, case.inputs)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    f = lrkfac.evaluator(case.model, likelihood, layers, "mc")
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=rank, damping=damping)
    state = tx.init(params)
    for i in range(8):
        chosen = torch.randint(len(case.inputs), (batch,), generator=g)
        x, y = case.inputs[chosen], case.targets[chosen]
        noise = torch.rand((1, *case.model(params, x).shape), generator=g)
        e = f(params, x, y, statistics=i % 3 == 0, noise=noise if i % 3 == 0 else None)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
        assert e.loss_at(params) <= e.loss + 1e-4 * e.loss.abs()
        assert all(p.isfinite().all() for p in optree.tree_leaves((params, state)))


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [True, False])
def test_compiled_equals_eager(statistics):
    torch.compiler.reset()
    layers, evaluate = layers_and_evaluate(MLP)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=2)

    def step(params, state):
        e = evaluate(params, statistics=statistics)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state

    params, state = step(MLP.params, tx.init(MLP.params))
    close(traced(step)(params, state), step(params, state), rtol=1e-8, atol=1e-10)


def test_it_is_written_for_preconditioners_in_chains():
    layers, evaluate = layers_and_evaluate(MLP)
    inner = lrkfac.chain(precondition_by_fisher(layers, DENSE), lrkfac.scale(2.0))
    doubled = scale_by_quadratic_model(inner)
    plain = scale_by_quadratic_model(precondition_by_fisher(layers, DENSE))
    e = evaluate(MLP.params)
    (twice, _), (once, _) = (t.update(e.grads, t.init(MLP.params), MLP.params, evaluation=e) for t in (doubled, plain))
    close(twice, once, rtol=1e-8)


def test_the_mark_of_a_preconditioner_is_all_that_is_asked():
    """A custom preconditioner needs a state that says so, and the extra."""

    class State(NamedTuple):
        damping: torch.Tensor

        @property
        def preconditions(self):
            return True

    def update(updates, state, params=None, *, factor_damping, **extra):
        return optree.tree_map(lambda g: g / (1 + factor_damping), updates), State(factor_damping + 0)

    tx = scale_by_quadratic_model(GradientTransformation(lambda params: State(torch.zeros(())), update))
    _, evaluate = layers_and_evaluate(MLP)
    e = evaluate(MLP.params)
    updates, _ = tx.update(e.grads, tx.init(MLP.params), MLP.params, evaluation=e)
    assert e.loss_at(lrkfac.apply_updates(MLP.params, updates)) < e.loss
