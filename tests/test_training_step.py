"""A whole training step: loss, statistics, preconditioning, update.

Full rank equals dense K-FAC; mapped over an ensemble and one by one are the same; nothing given is
changed; odd tensors just work; the loss goes down.
"""

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac.core.curvature.low_rank import LowRankPlusDiagonalStructure, LowRankStructure
from lrkfac.structures import kronecker
from tests import cases, reference_networks, reference_optimizers
from tests.transforms.test_precondition import cast

MLP, WIDTH_ONE, SHIFT, SEQUENCE = cases.LINEAR[0], cases.LINEAR[4], cases.LINEAR[6], cases.SEQUENCE[0]
STRIDE, GROUPS = cases.CONVOLUTION[0], cases.CONVOLUTION[3]
OPTIONS = {"damping": 0.03, "decay": 0.8, "momentum": 0.9, "weight_decay": 0.01, "kl_clip": 1e-3}
RATE = 0.1


class NeverDense(LowRankStructure):
    def fitted(self, dimension):
        return self


class NeverDensePlusDiagonal(LowRankPlusDiagonalStructure):
    def fitted(self, dimension):
        return self


def chained(layers, structure, learning_rate=RATE):
    """``low_rank_kfac`` with ``OPTIONS`` and any structure."""
    return lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, structure, damping=OPTIONS["damping"], decay=OPTIONS["decay"]),
        lrkfac.clip_by_kl(OPTIONS["kl_clip"], learning_rate),
        lrkfac.trace(OPTIONS["momentum"]),
        lrkfac.add_decayed_weights(OPTIONS["weight_decay"]),
        lrkfac.scale_by_learning_rate(learning_rate),
    )


def low_rank(rank):
    return lambda layers: lrkfac.low_rank_kfac(layers, RATE, rank=rank, **OPTIONS)


def never_dense(rank, **options):
    structure = kronecker(NeverDense(rank, **options), NeverDensePlusDiagonal(rank, **options))
    return lambda layers: chained(layers, structure)


def dense(layers):
    return lrkfac.kfac(layers, RATE, **OPTIONS)


FULL_RANK = {
    "low_rank_kfac": low_rank(100),
    "kept low rank": never_dense(100),
    "kept low rank, by power iteration": never_dense(100, method="power"),
    "sides swapped": lambda layers: chained(layers, kronecker(NeverDensePlusDiagonal(100), NeverDense(100))),
}
each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)


def stepper(case, make, estimator="mc"):
    """``(params, state, inputs, targets, noise, statistics) -> (params, state, loss)``, and ``init``."""
    layers = lrkfac.find_layers(case.model, case.params, case.inputs)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    evaluate, tx = lrkfac.evaluator(case.model, likelihood, layers, estimator), make(layers)

    def step(params, state, inputs, targets, noise, statistics=True):
        noise = noise if estimator == "mc" else None
        e = evaluate(params, inputs, targets, statistics=statistics, noise=noise)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state, e.loss

    return step, tx.init


def noises(case, number):
    shape = case.model(case.params, case.inputs).shape
    return torch.rand(number, 1, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def trained(case, make, estimator="mc", steps=1, every=1):
    """The parameters after each step, and the losses; statistics at every ``every``-th."""
    step, init = stepper(case, make, estimator)
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


def change(params, case):
    return {name: params[name] - p for name, p in case.params.items()}


def reference_steps(case, estimator, steps):
    """The parameters after each step of dense K-FAC with ``OPTIONS``, from the references alone."""
    state, clipped, path = None, [], []
    for _ in range(steps):
        one = reference_networks.dense_kfac_step(
            case, state, estimator=estimator, damping=OPTIONS["damping"], decay=OPTIONS["decay"]
        )
        clipped.append(reference_optimizers.clipped_by_kl(one.preconditioned, one.gradients, RATE, OPTIONS["kl_clip"]))
        velocity = reference_optimizers.momentum_trace(clipped, OPTIONS["momentum"])[-1]
        update = reference_optimizers.decayed_weights_added(velocity, case.params, OPTIONS["weight_decay"])
        case = case._replace(params={k: p - RATE * update[k] for k, p in case.params.items()})
        state = one.state
        path.append(case.params)
    return path


@each_case
def test_one_step_of_full_rank_equals_dense(case):
    (expected,), _, _ = trained(case, dense)
    for make in FULL_RANK.values():
        (found,), _, _ = trained(case, make)
        close(change(found, case), change(expected, case), 1e-10)


@each_case
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_steps_of_full_rank_equal_the_reference(case, estimator):
    expected = reference_steps(case, estimator, 4)
    for make in (dense, low_rank(100), never_dense(100)):
        found, _, _ = trained(case, make, estimator, steps=4)
        for params, other in zip(found, expected, strict=True):
            close(params, other, 1e-8)


@pytest.mark.parametrize("case", [MLP, GROUPS], ids=lambda case: case.name)
def test_full_rank_equals_dense_with_old_inverses_between(case):
    expected, _, _ = trained(case, dense, steps=6, every=3)
    for make in FULL_RANK.values():
        found, _, _ = trained(case, make, steps=6, every=3)
        close(found[-1], expected[-1], 1e-8)


@pytest.mark.parametrize("make", [never_dense(2), low_rank(1), dense], ids=["never dense", "low rank", "dense"])
@pytest.mark.parametrize("case", [MLP, SHIFT, GROUPS], ids=lambda case: case.name)
def test_ensemble_under_vmap_equals_separate_runs(case, make):
    step, init = stepper(case, make)
    members = [optree.tree_map(lambda p, i=i: p * (1 + 0.1 * i) + 0.01 * i, case.params) for i in range(3)]
    params = optree.tree_map(lambda *p: torch.stack(p), *members)
    inputs = torch.stack([case.inputs * (1 + 0.2 * i) for i in range(3)])
    state, states = vmap(init)(params), [init(member) for member in members]
    for noise, statistics in zip(noises(case, 12).unflatten(0, (4, 3)), (True, False, True, True), strict=True):
        mapped = vmap(lambda p, s, x, u, on=statistics: step(p, s, x, case.targets, u, on))
        params, state, losses = mapped(params, state, inputs, noise)
        for i in range(3):
            members[i], states[i], loss = step(members[i], states[i], inputs[i], case.targets, noise[i], statistics)
            torch.testing.assert_close(losses[i], loss, rtol=1e-9, atol=0)
            close({k: p[i] for k, p in params.items()}, members[i], 1e-9)


def test_ensemble_draws_its_own_noise_if_asked():
    step, init = stepper(MLP, low_rank(2))
    params = optree.tree_map(lambda p: torch.stack([p, p]), MLP.params)
    mapped = vmap(lambda p, s: step(p, s, MLP.inputs, MLP.targets, None), randomness="different")
    found, _, _ = mapped(params, vmap(init)(params))
    assert all(p.isfinite().all() for p in found.values())
    assert not torch.equal(*found["0.weight"])


@pytest.mark.parametrize("make", [never_dense(2), low_rank(1), dense], ids=["never dense", "low rank", "dense"])
@pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])
def test_no_argument_is_changed(make, estimator):
    step, init = stepper(STRIDE, make, estimator)
    state = init(STRIDE.params)
    for i in range(4):
        given = (STRIDE.params, state, STRIDE.inputs, STRIDE.targets, noises(STRIDE, 1)[0])
        before = optree.tree_map(torch.clone, given)
        first = step(*given, i % 2 == 0)
        again = step(*given, i % 2 == 0)
        assert optree.tree_all(optree.tree_map(torch.equal, given, before))
        assert optree.tree_all(optree.tree_map(torch.equal, first, again)), "equal calls give equal results"
        state = first[1]


@pytest.mark.parametrize("make", [never_dense(2), low_rank(100), dense], ids=["never dense", "full", "dense"])
@pytest.mark.parametrize("case", [MLP, SEQUENCE, STRIDE, GROUPS], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(case, make, dtype):
    """Parameters keep their dtype, factors have at least float32, and the path is near that in float64."""
    path, losses, state = trained(cast(case, dtype), make, "exact", steps=3)
    expected, (start, *_), _ = trained(case, make, "exact", steps=3)
    assert {p.dtype for p in path[-1].values()} == {dtype}
    factors = {x.dtype for x in optree.tree_leaves(state[0][:2])}
    assert factors == {torch.int64, torch.promote_types(dtype, torch.float32)}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]
    close(path[-1], expected[-1], tolerance)
    assert losses[0] == pytest.approx(start, rel=tolerance) and losses[-1] < losses[0]


def zeros(case, name):
    return case._replace(**{name: optree.tree_map(torch.zeros_like, getattr(case, name))})


ODD = {
    "zero inputs": lambda c: zeros(c, "inputs"),
    "zero parameters": lambda c: zeros(c, "params"),
    "zero inputs and parameters": lambda c: zeros(zeros(c, "params"), "inputs"),
    "zero output gradients": lambda c: c._replace(
        likelihood="gaussian", likelihood_options={}, targets=c.model(c.params, c.inputs)
    ),
    "batch of one": lambda c: c._replace(inputs=c.inputs[:1], targets=c.targets[:1]),
    "large": lambda c: c._replace(inputs=1e6 * c.inputs),
    "small": lambda c: c._replace(inputs=1e-12 * c.inputs),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("case", [WIDTH_ONE, MLP, GROUPS], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_odd_batches_just_work(case, odd, dtype):
    case = odd(cast(case, dtype))
    for make in (never_dense(1), never_dense(100), dense):
        path, losses, state = trained(case, make, steps=3, every=2)
        assert all(x.isfinite().all() for x in optree.tree_leaves((path, state, torch.tensor(losses))))


VIEWS = {
    "non-contiguous": lambda p: p.expand(2, *p.shape).movedim(0, -1).clone()[..., 1],
    "leaf": lambda p: p.clone().requires_grad_(),
    "non-leaf": lambda p: p.clone().requires_grad_() * 1,
    "parameter": lambda p: torch.nn.Parameter(p.clone()),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("case", [MLP, GROUPS], ids=lambda case: case.name)
def test_odd_tensors_give_the_same(case, view):
    odd = case._replace(params=optree.tree_map(view, case.params), inputs=view(case.inputs))
    for make in (never_dense(2), dense):
        expected, _, _ = trained(case, make, steps=3)
        found, _, _ = trained(odd, make, steps=3)
        close(found[-1], expected[-1], 1e-9)


@pytest.mark.parametrize(
    "make", [low_rank(1), low_rank(4), never_dense(1), dense], ids=["rank 1", "rank 4", "never dense", "dense"]
)
@pytest.mark.parametrize("case", [MLP, cases.LINEAR[1], SEQUENCE, STRIDE, GROUPS], ids=lambda case: case.name)
def test_the_loss_goes_down(case, make):
    _, losses, _ = trained(case, make, steps=20, every=2)
    assert losses[-1] < 0.7 * losses[0]
