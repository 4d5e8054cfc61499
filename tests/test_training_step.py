"""A whole training step: loss, statistics, preconditioning, update."""

from functools import partial

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure, LowRankStructure
from lrkfac.structures import kronecker
from tests import cases, reference_networks, reference_optimizers
from tests.described import layers_of
from tests.transforms.test_precondition import cast

MLP, WIDTH_ONE, SHIFT, SEQUENCE = cases.LINEAR[0], cases.LINEAR[4], cases.LINEAR[6], cases.SEQUENCE[0]
STRIDE, GROUPS = cases.CONVOLUTION[0], cases.CONVOLUTION[3]
WIDE = cases.make_case("wide", (cases.linear(16, 16), cases.tanh, cases.linear(16, 3)), (4, 16))
OPTIONS = {"damping": 0.03, "decay": 0.8, "momentum": 0.9, "weight_decay": 0.01, "kl_clip": 1e-3}
RATE = lrkfac.schedules.warmup_cosine_decay_schedule(0.1, 0.3, 2, 5)


NeverDense, NeverDensePlusDiagonal = (
    type("NeverDense", (base,), {"fitted": lambda self, dimension: self})
    for base in (LowRankStructure, LowRankPlusDiagonalStructure)
)


def chained(layers, structure, rate=RATE, damping=0.03, decay=0.8, momentum=0.9, weight_decay=0.01, kl_clip=1e-3):
    """``low_rank_kfac`` with any structure; by default with ``OPTIONS``."""
    return lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, structure, damping=damping, decay=decay),
        lrkfac.clip_by_kl(kl_clip, rate),
        lrkfac.trace(momentum),
        lrkfac.add_decayed_weights(weight_decay),
        lrkfac.scale_by_learning_rate(rate),
    )


def low_rank(rank):
    return partial(lrkfac.low_rank_kfac, learning_rate=RATE, rank=rank, **OPTIONS)


def never_dense(rank, **options):
    structure = kronecker(NeverDense(rank, **options), NeverDensePlusDiagonal(rank, **options))
    return lambda layers: chained(layers, structure)


dense = partial(lrkfac.kfac, learning_rate=RATE, **OPTIONS)
FULL_RANK = {
    "kfac": dense,
    "low_rank_kfac": low_rank(100),
    "kept low rank": never_dense(100),
    "kept low rank, by power iteration": never_dense(100, method="power"),
    "sides swapped": lambda layers: chained(layers, kronecker(NeverDensePlusDiagonal(100), NeverDense(100))),
}


def stepper(case, make, estimator="mc", thin=False):
    """``(params, state, inputs, targets, noise, statistics) -> (params, state, loss)``, and ``init``."""
    layers = layers_of(case)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    evaluate, tx = lrkfac.evaluator(case.model, likelihood, layers, estimator, thin=thin), make(layers)

    def step(params, state, inputs, targets, noise, statistics=True):
        noise = noise if estimator == "mc" else None
        e = evaluate(params, inputs, targets, statistics=statistics, noise=noise)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state, e.loss

    return step, tx.init


def noises(case, number):
    shape = case.model(case.params, case.inputs).shape
    return torch.rand(number, 1, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def trained(case, make, estimator="mc", steps=3, every=1, thin=False):
    """The parameters after each step, the losses and the last state; statistics at every ``every``-th."""
    step, init = stepper(case, make, estimator, thin)
    params, state, path, losses = case.params, init(case.params), [], []
    for i, noise in enumerate(noises(case, steps)):
        params, state, loss = step(params, state, case.inputs, case.targets, noise, i % every == 0)
        path.append(params)
        losses.append(loss.item())
    return path, losses, state


def close(found, expected, tolerance):
    """Relative to the norm of each parameter."""
    for name, x in expected.items():
        error = (found[name].double() - x.double()).norm()
        assert error <= tolerance * x.norm(), f"{name}: relative error {error / x.norm():.1e}"


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_steps_of_full_rank_equal_the_reference(case, estimator):
    """Under a schedule of learning rates, over three refreshes with steps on the old inverses between.

    The factors do not know of which estimator their rows are.
    """
    makers = FULL_RANK if estimator == "exact" else {name: FULL_RANK[name] for name in ("kfac", "kept low rank")}
    paths = {name: trained(case, make, estimator, steps=5, every=2)[0] for name, make in makers.items()}
    state, clipped = None, []
    for i in range(5):
        rate = reference_optimizers.warmup_cosine_decay_schedule(i, 0.3, 2, 5, 0.1)
        if i % 2 == 0:
            state = reference_networks.averaged_factors(case, state, estimator, OPTIONS["decay"])
        grads = reference_networks.gradients(case)
        natural = reference_networks.preconditioned_gradients(case, grads, state.averages, OPTIONS["damping"])
        clipped.append(reference_optimizers.clipped_by_kl(natural, grads, rate, OPTIONS["kl_clip"]))
        velocity = reference_optimizers.momentum_trace(clipped, OPTIONS["momentum"])[-1]
        update = reference_optimizers.decayed_weights_added(velocity, case.params, OPTIONS["weight_decay"])
        expected = {name: p - rate * update[name] for name, p in case.params.items()}
        changes = {name: p - case.params[name] for name, p in expected.items()}
        for path in paths.values():
            before = path[i - 1] if i else case.params
            close({name: p - before[name] for name, p in path[i].items()}, changes, 1e-8)
        case = case._replace(params=expected)


spectral = partial(lrkfac.spectral_kfac, learning_rate=RATE, rank=2, weight_decay=0.01)
untuned = partial(lrkfac.spectral_kfac, rank=2, weight_decay=0.01)
ENSEMBLES = {
    "never dense": never_dense(2), "low rank": low_rank(1), "dense": dense, "spectral": spectral,
    "spectral, no rate": untuned,
}  # fmt: skip


@pytest.mark.parametrize("make", ENSEMBLES.values(), ids=ENSEMBLES)
@pytest.mark.parametrize("case", [MLP, SHIFT, GROUPS, WIDE], ids=lambda case: case.name)
def test_ensemble_under_vmap_equals_separate_runs(case, make):
    step, init = stepper(case, make, thin=case is WIDE)
    members = [optree.tree_map(lambda p, i=i: p * (1 + 0.1 * i) + 0.01 * i, case.params) for i in range(2)]
    params = optree.tree_map(lambda *p: torch.stack(p), *members)
    inputs = torch.stack([case.inputs * (1 + 0.2 * i) for i in range(2)])
    state, states = vmap(init)(params), [init(member) for member in members]
    for noise, statistics in zip(noises(case, 6).unflatten(0, (3, 2)), (True, False, True), strict=True):
        mapped = vmap(lambda p, s, x, u, on=statistics: step(p, s, x, case.targets, u, on))
        params, state, losses = mapped(params, state, inputs, noise)
        for i in range(2):
            members[i], states[i], loss = step(members[i], states[i], inputs[i], case.targets, noise[i], statistics)
            torch.testing.assert_close(losses[i], loss, rtol=1e-9, atol=0)
            close({k: p[i] for k, p in params.items()}, members[i], 1e-9)


@pytest.mark.parametrize("make", [never_dense(2), low_rank(100), dense], ids=["never dense", "full", "dense"])
@pytest.mark.parametrize("case", [MLP, SEQUENCE, STRIDE, GROUPS], ids=lambda case: case.name)
def test_dtypes(case, make):
    """Parameters keep their dtype, factors have at least float32, the path is near that in float64, losses go down."""
    expected, (start, *_), _ = trained(case, make, "exact")
    for dtype, tolerance in {torch.float64: 1e-12, torch.float32: 1e-3, torch.bfloat16: 0.05}.items():
        path, losses, state = trained(cast(case, dtype), make, "exact")
        assert {p.dtype for p in path[-1].values()} == {dtype}
        factors = {x.dtype for x in optree.tree_leaves(state[0][:2])}
        assert factors == {torch.int64, torch.promote_types(dtype, torch.float32)}
        close(path[-1], expected[-1], tolerance)
        assert losses[0] == pytest.approx(start, rel=tolerance) and losses[-1] < losses[0]


def zeros(*names):
    return lambda c: c._replace(**{n: optree.tree_map(torch.zeros_like, getattr(c, n)) for n in names})


ODD = {
    "zero inputs": zeros("inputs"),
    "zero parameters": zeros("params"),
    "zero inputs and parameters": zeros("params", "inputs"),
    "zero output gradients": lambda c: c._replace(
        likelihood="gaussian", likelihood_options={}, targets=c.model(c.params, c.inputs)
    ),
    "batch of one": lambda c: c._replace(inputs=c.inputs[:1], targets=c.targets[:1]),
    "large": lambda c: c._replace(inputs=1e6 * c.inputs),
    "small": lambda c: c._replace(inputs=1e-12 * c.inputs),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize(
    "case, dtype",
    [
        *[(case, torch.bfloat16) for case in (WIDTH_ONE, MLP, GROUPS)],
        *[(c, torch.float64) for c in (WIDTH_ONE, GROUPS)],
    ],
)
def test_odd_batches_just_work(case, odd, dtype):
    case = odd(cast(case, dtype))
    for make in (never_dense(1), never_dense(100), dense):
        path, losses, state = trained(case, make, every=2)
        assert all(x.isfinite().all() for x in optree.tree_leaves((path, state, torch.tensor(losses))))
