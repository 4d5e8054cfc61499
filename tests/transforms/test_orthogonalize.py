"""``orthogonalize_by_fisher``: Muon without factors, a bound that is met, no basis that matters, a dense reference."""

import optree
import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import orthogonalize_by_fisher, precondition_by_fisher
from lrkfac.core.curvature.factors import DenseState
from lrkfac.core.curvature.kronecker import KroneckerState
from lrkfac.core.curvature.spectral import SpectralStructure
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.linalg import polar, to_dense
from lrkfac.structures import dense
from lrkfac.transforms.orthogonalize import Orthogonalize
from tests import cases, reference, reference_networks
from tests.tensors import normal
from tests.transforms.test_base import close, trained
from tests.transforms.test_precondition import layers_and_evaluate

MLP, SHIFT, GROUPS, SEQUENCE = cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[3], cases.SEQUENCE[0]
NO_BIAS, STRIDE = cases.LINEAR[3], cases.CONVOLUTION[0]
some_cases = pytest.mark.parametrize("case", [MLP, NO_BIAS, SEQUENCE, STRIDE, GROUPS], ids=lambda case: case.name)
POWERS = [0.0, 0.25, 0.5]
EXACT = {"iterations": None, "normalized": False}


def without_statistics(case):
    layers, evaluate = layers_and_evaluate(case)
    return layers, lambda params, statistics=True: evaluate(params, statistics=False)


def momenta(gradients, decay=0.95):
    """Nesterov's averages of a list of trees."""
    m, found = optree.tree_map(torch.zeros_like, gradients[0]), []
    for g in gradients:
        m = optree.tree_map(lambda m, g: decay * m + (1 - decay) * g, m, g)
        found.append(optree.tree_map(lambda m, g: decay * m + (1 - decay) * g, m, g))
    return found


# Muon ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("options", [{"power": 0.0}, {"rank": 2}], ids=["power 0", "no statistics"])
def test_without_factors_it_is_muon(options, normalized):
    """The same gradients, step by step: torch's own polar factor is that of 5 iterations in bfloat16."""
    layers, evaluate = layers_and_evaluate(NO_BIAS, "empirical")
    tx = orthogonalize_by_fisher(layers, iterations=None, normalized=normalized, **options)
    state = tx.init(NO_BIAS.params)
    leaves = {name: p.clone().requires_grad_() for name, p in NO_BIAS.params.items()}
    muon = torch.optim.Muon(leaves.values(), lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(4):
        e = evaluate(NO_BIAS.params, statistics="power" in options)
        noise = lambda g: g + torch.randn(g.shape, generator=generator, dtype=g.dtype) * g.std()  # noqa: E731
        drawn.append({name: noise(g) for name, g in e.grads.items()})
        updates, state = tx.update(drawn[-1], state, NO_BIAS.params, evaluation=e)
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            leaf.grad = drawn[-1][name].clone()
        muon.step()
        for name, u in updates.items():
            step = before[name] - leaves[name].detach()
            d = max(step.shape)
            expected = reference.polar_factor(momenta(drawn)[-1][name]) * d**0.5
            close(u, reference.of_unit_mean_square(expected) if normalized else expected, 1e-8)
            factor = step / (0.2 * d**0.5)
            singular = torch.linalg.svdvals(factor)
            assert singular.min() > 0.5 and singular.max() < 1.3
            assert (polar(factor, None) - expected / d**0.5).abs().max() < 0.06


# The definition ------------------------------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("normalized", [True, False])
def test_steps_of_full_rank_equal_the_reference(case, power, normalized):
    """Over refreshes with steps on the old powers between."""
    layers, evaluate = layers_and_evaluate(case)
    options = {"power": power, "decay": 0.8, "damping": 0.01, "momentum": 0.7, "iterations": None}
    tx = orthogonalize_by_fisher(layers, rank=100, normalized=normalized, **options)
    rate = -0.01 if normalized else -1e-3
    tx = lrkfac.chain(tx, lrkfac.scale(rate))
    grads, averages = [], None
    for i, step in enumerate(trained(tx, case.params, evaluate, 3)):
        if i % 2 == 0:
            averages = reference_networks.averaged_factors(case, averages, "exact", 0.8)
        grads.append(reference_networks.gradients(case))
        M = momenta(grads, 0.7)[-1]
        for name, (A, B) in averages.averages.items():
            matrix = reference_networks.gradient_matrix(case, name, M)
            D = reference.spectral_direction(matrix, A, B, power, 0.01)
            D = reference.of_unit_mean_square(D) if normalized else D
            for path, expected in reference_networks.layer_gradients(case, name, D).items():
                close(step.updates[path] / rate, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        case = case._replace(params=step.params)


@some_cases
@pytest.mark.parametrize("power", POWERS)
def test_the_bound_of_the_norm_is_met_and_nothing_within_it_is_steeper(case, power):
    """All singular values of (B + δ)^p D (A + δ)^p are √max(d_in, d_out), or 0 where the gradient has none."""
    layers, evaluate = layers_and_evaluate(case)
    tx = orthogonalize_by_fisher(layers, rank=2, power=power, momentum=0.0, damping=0.05, **EXACT)
    *_, (e, updates, state, _) = trained(lrkfac.chain(tx, lrkfac.identity()), case.params, evaluate, 3, every=1)
    state = state[0]
    for layer in layers:
        M, D = (reference_networks.gradient_matrix(case, layer.name, tree) for tree in (e.grads, updates))
        factors, dampings = state.preconditioner.factors[layer.name], state.preconditioner.dampings[layer.name]
        for group in range(layer.groups):
            one = optree.tree_map(lambda x, g=group, n=layer.groups: x[g] if n > 1 else x, (factors, dampings))
            B, A = (to_dense(side.operator()) for side in one[0])
            means = torch.stack([B.trace() / len(B), A.trace() / len(A)])
            close(one[1], 0.05 * means, 1e-10)
            left, right = (reference.negative_power(X, -power, d) for X, d in zip((B, A), one[1], strict=True))
            values = torch.linalg.svdvals(left @ D[group] @ right) / max(layer.d_in, layer.d_out) ** 0.5
            W = torch.linalg.solve(left, M[group]) @ torch.linalg.inv(right)
            nuclear = torch.linalg.svdvals(W)
            close(values, values.round(), 1e-6, 1e-6)
            assert (nuclear > 1e-9 * nuclear[0]).sum() <= values.sum().round() <= (nuclear > 1e-12 * nuclear[0]).sum()
            close((M[group] * D[group]).sum(), nuclear.sum() * max(layer.d_in, layer.d_out) ** 0.5, 1e-8)


def direction(M, A, B, power, share=1e-13):
    structure = SpectralStructure(dense(), dense(), power=power, iterations=None, normalized=False)
    steps = torch.ones((), dtype=torch.int64)
    state = KroneckerState(DenseState(B, steps), DenseState(A, steps))
    return structure.apply(structure.damped_inverse(state, share)[0], LayerMatrix(M)).weight


def test_at_the_root_no_basis_of_inputs_or_outputs_matters():
    """With T a and R s in place of inputs a and outputs s, W becomes R W T⁻¹, and so does D; not so at other powers."""
    M, (A, B) = normal(4, 6), (x.mT @ x for x in (normal(12, 6, seed=1), normal(9, 4, seed=2)))
    R, T = torch.eye(4) + normal(4, 4, seed=3) / 3, torch.eye(6) + normal(6, 6, seed=4) / 3
    back = torch.linalg.inv(R)
    for power, matters in ((0.5, False), (0.25, True), (0.0, True)):
        D = direction(M, A, B, power)
        turned = direction(back.mT @ M @ T.mT, T @ A @ T.mT, back.mT @ B @ back, power)
        error = (turned - R @ D @ torch.linalg.inv(T)).norm() / turned.norm()
        assert (error > 0.1) if matters else (error < 1e-8)


def test_rank_d_equals_dense_factors():
    layers, evaluate = layers_and_evaluate(SEQUENCE, "empirical")
    inner = precondition_by_fisher(
        layers, SpectralStructure(dense(), dense(), iterations=None), damping=1e-3, decay=0.8
    )
    of_dense = trained(Orthogonalize(layers, inner, lrkfac.trace(0.95, nesterov=True)), SEQUENCE.params, evaluate)
    of_rank = trained(orthogonalize_by_fisher(layers, rank=7, iterations=None), SEQUENCE.params, evaluate)
    for one, other in zip(of_dense, of_rank, strict=True):
        close(one.updates, other.updates, 1e-6)


# What it covers ------------------------------------------------------------------------------------------


def mixed(p, x):
    y = F.layer_norm(F.embedding(x, p["embedding"]), (6,), p["scale"], p["shift"])
    return F.linear(torch.tanh(F.linear(y.mean(1), p["in"], p["bias"])), p["out"]) * p["loose"].exp()


def problem(model=mixed, dtype=torch.float64, thin=False, **more):
    params = {"embedding": normal(9, 6), "scale": 1 + normal(6) / 9, "shift": normal(6), "in": normal(7, 6, seed=1)}
    params |= {"bias": normal(7), "out": normal(3, 7), "loose": normal(3) / 9} | more
    params = {name: p.to(dtype) for name, p in params.items()}
    x, y = torch.arange(20).reshape(5, 4) % 9, torch.arange(5) % 3
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical", thin=thin)
    return layers, params, lambda p, statistics=True: evaluate(p, x, y, statistics)


def test_zero_gradients_take_no_step():
    layers, params, evaluate = problem()
    tx, e = orthogonalize_by_fisher(layers), evaluate(params)
    updates, _ = tx.update(optree.tree_map(torch.zeros_like, e.grads), tx.init(params), params, evaluation=e)
    assert all(not u.any() for u in updates.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    """Factors have at least float32, momentum and updates the dtype of the parameters.

    Rounding of a gradient of lower rank becomes directions of its own, which the polar factor raises with all others:
    of bfloat16 all that stays is descent.
    """
    (expected, *_), (found, *_) = (
        trained(orthogonalize_by_fisher(layers), params, evaluate)
        for layers, params, evaluate in (problem(), problem(dtype=dtype))
    )
    assert {u.dtype for u in found.updates.values()} == {m.dtype for m in found.state.momentum} == {dtype}
    assert found.state.preconditioner.factors["in"].input.vectors.dtype == torch.float32
    for name in ("in", "out"):
        if dtype == torch.float32:
            near = F.cosine_similarity(found.updates[name].double().flatten(), expected.updates[name].flatten(), dim=0)
            assert near > 0.999
        assert (found.updates[name] * found.evaluation.grads[name]).sum() > 0


def test_lazy_gradients_are_materialized():
    of_rows, plain = (
        trained(orthogonalize_by_fisher(layers), params, evaluate)
        for layers, params, evaluate in (problem(thin=True), problem())
    )
    assert isinstance(of_rows[0].updates["in"], lrkfac.LazyMatrix)
    for one, other in zip(of_rows, plain, strict=True):
        close(lrkfac.materialize(one.updates), other.updates, 1e-9)


@pytest.mark.parametrize("share", [1e-3, torch.tensor(1e-3, dtype=torch.float64)], ids=["number", "tensor"])
def test_numbers_may_be_tensors(share):
    layers, params, evaluate = problem()
    one, other = (
        trained(orthogonalize_by_fisher(layers, damping=d, momentum=m, decay=r), params, evaluate)
        for d, m, r in ((1e-3, 0.95, 0.8), (share, *torch.tensor([0.95, 0.8], dtype=torch.float64)))
    )
    close([step.updates for step in one], [step.updates for step in other], 1e-6)


@pytest.mark.parametrize("options, message", [
    ({"power": -0.1}, "power: expected a finite number"), ({"power": 1.5}, "power: expected a number from 0 to 1"),
    ({"power": torch.tensor(0.2)}, "power: expected a number, got a tensor"), ({"momentum": 1.0}, "momentum: expected"),
    ({"damping": 0.0}, "damping: expected"), ({"iterations": 0}, "iterations: expected"),
    ({"rank": 0}, "rank: expected"), ({"normalized": 1}, "normalized: expected"),
])  # fmt: skip
def test_bad_arguments_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        orthogonalize_by_fisher(layers_and_evaluate(MLP)[0], **options)


def test_another_state_is_refused():
    layers, evaluate = layers_and_evaluate(MLP)
    tx, e = orthogonalize_by_fisher(layers), evaluate(MLP.params)
    state = tx.init(MLP.params)
    for bad, message in (
        (state.preconditioner, "expected an OrthogonalizeState"),
        (state._replace(momentum=()), "orth"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(e.grads, bad, MLP.params, evaluation=e)
    with pytest.raises(TypeError, match="orthogonalize_by_fisher: evaluation is missing"):
        tx.update(e.grads, state, MLP.params)


def test_diagnoses_are_those_of_the_damped_factors():
    """Powers are no inverses: numbers of damping follow from the eigenvalues and the dampings."""
    layers, params, evaluate = problem()
    *_, step = trained(orthogonalize_by_fisher(layers, rank=2), params, evaluate)
    diagnosis = lrkfac.diagnose(step.state, layers, updates=step.updates)
    for name in ("in", "out"):
        factors = step.state.preconditioner.factors[name]
        dampings = step.state.preconditioner.dampings[name]
        product = 1.0
        for side, state, damping in zip(("B", "A"), factors, dampings, strict=True):
            eigenvalues = torch.linalg.eigvalsh(to_dense(state.operator())).clamp(min=0)
            effective = (eigenvalues / (eigenvalues + damping)).sum()
            numbers = diagnosis.layers[name].numbers[side]
            close([numbers["effective_dimension"], numbers["damping"]], [effective, damping], 1e-6)
            product = product * effective
        close(diagnosis.layers[name].numbers["F"]["effective_dimension"], product, 1e-6)
    assert "in" in str(diagnosis) and set(lrkfac.ranks_by_trace(step.state, layers)) == {"in", "out"}
