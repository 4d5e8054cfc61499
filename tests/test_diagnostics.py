"""What ``diagnose`` finds, in any chain, against dense matrices."""

import io

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac import diagnose, low_rank_kfac, precondition_by_fisher
from lrkfac.linalg import to_dense
from lrkfac.structures import diagonal, full, kronecker, layer_wise, low_rank, unit_wise
from tests import cases
from tests.transforms.test_precondition import STRUCTURES, each_structure, layers_and_evaluate, some_cases

MLP, GROUPS = cases.LINEAR[0], cases.CONVOLUTION[3]


def trained(tx, case, steps=4):
    """The states after each step, and the last updates."""
    _, evaluate = layers_and_evaluate(case)
    params, states = case.params, [tx.init(case.params)]
    for i in range(steps):
        e = evaluate(params, statistics=i % 2 == 0)
        updates, state = tx.update(e.grads, states[-1], params, evaluation=e)
        params = optree.tree_map(lambda p, u: p - 0.1 * u, params, updates)
        states.append(state)
    return states, updates


def blocks(held, layer):
    """The dense matrices of all groups, block-diagonal."""
    each = [held] if layer.groups == 1 else [optree.tree_map(lambda x, i=i: x[i], held) for i in range(layer.groups)]
    return [(to_dense(one.output), to_dense(one.input)) for one in each]


@some_cases
@each_structure
def test_numbers_are_those_of_dense_matrices(case, structure):
    layers, _ = layers_and_evaluate(case)
    states, updates = trained(precondition_by_fisher(layers, structure, damping=0.05), case)
    found = diagnose(states[-1], layers, previous=states[1], updates=updates)
    for layer in layers:
        numbers = found.layers[layer.name].numbers
        fitted = structure.fitted(layer.d_in, layer.d_out)
        operator = fitted.operator if layer.groups == 1 else vmap(fitted.operator)
        now, old = (blocks(operator(s.factors[layer.name]), layer) for s in (states[-1], states[1]))
        inverses = blocks(states[-1].inverses[layer.name], layer)
        effective = sum((B @ C).trace() * (A @ D).trace() for (B, A), (C, D) in zip(now, inverses, strict=True))
        torch.testing.assert_close(numbers["F"]["effective_dimension"], effective, rtol=1e-6, atol=1e-9)
        spectra = torch.cat([1 / torch.linalg.eigvalsh(torch.kron(C, D)) for C, D in inverses])
        condition = spectra.amax() / spectra.amin()
        assert numbers["F"]["condition"] >= condition * (1 - 1e-6)
        if structure in (STRUCTURES["dense"], STRUCTURES["diagonal"]):
            torch.testing.assert_close(numbers["F"]["condition"], condition, rtol=1e-6, atol=0)
        for i, side in enumerate("BA"):
            M, N = (torch.block_diag(*[pair[i] for pair in pairs]) for pairs in (now, old))
            torch.testing.assert_close(numbers[side]["drift"], (M - N).norm() / M.norm(), rtol=1e-5, atol=1e-7)
            held = found.layers[layer.name].eigenvalues[side]
            assert numbers[side]["rank"] == len(held) <= len(M)
            torch.testing.assert_close(numbers[side]["captured"], held.sum() / M.trace(), rtol=1e-9, atol=1e-12)
            assert numbers[side]["damping"] == states[-1].dampings[layer.name][..., i].mean()
        own = [updates[p.path] for p in (layer.weight, layer.bias) if p is not None]
        torch.testing.assert_close(numbers["F"]["update_norm"], torch.cat([x.reshape(-1) for x in own]).norm())


LAYERS, EVALUATE = layers_and_evaluate(MLP)
KFAC = low_rank_kfac(LAYERS, 0.1, rank=2)
CHAINS = {
    "masked": lrkfac.masked(KFAC, lambda p: optree.tree_map(lambda _: True, p)),
    "partition": lrkfac.partition({"a": KFAC, "b": lrkfac.scale(-1.0)}, lambda p: optree.tree_map(lambda _: "a", p)),
    "inject": lrkfac.inject_hyperparams(low_rank_kfac)(LAYERS, learning_rate=0.1, rank=2),
    "apply if finite": lrkfac.apply_if_finite(KFAC, 3),
    "chain": lrkfac.chain(lrkfac.identity(), KFAC),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_preconditioner_is_found_in_any_chain(name):
    expected, found = (diagnose(trained(tx, MLP)[0][-1], LAYERS).metrics() for tx in (KFAC, CHAINS[name]))
    more = {"inject": {"lrkfac/hyperparameters/learning_rate"}, "apply if finite": {"lrkfac/left_out"}}
    assert found.keys() - expected.keys() == more.get(name, set())
    for key, x in expected.items():
        assert x.shape == () and torch.allclose(found[key], x, rtol=1e-9)


def test_the_adaptive_chain_tells_what_it_has_chosen_also_of_an_ensemble():
    states, updates = trained(lrkfac.adaptive_low_rank_kfac(LAYERS, rank=2, dense_up_to=0), MLP)
    found, model = diagnose(states[-1], LAYERS), states[-1][0]
    for name in ("learning_rate", "momentum", "damping", "factor_damping", "gradient_decay", "rejected"):
        assert found.chain[name] is getattr(model, name)
    torch.testing.assert_close(diagnose(states[-1], LAYERS, updates=updates).metrics(), found.metrics())
    assert "update_norm" in found.layers["0"].numbers["F"]
    both = optree.tree_map(lambda *x: torch.stack(x), *states[-2:])
    mapped = vmap(lambda s: diagnose(s, LAYERS).metrics())(both)
    for i, state in enumerate(states[-2:]):
        torch.testing.assert_close({k: x[i] for k, x in mapped.items()}, diagnose(state, LAYERS).metrics())
    with pytest.raises(ValueError, match=r"state: expected factors of .* for layer '0'.*vmap"):
        diagnose(both, LAYERS)


EXACT = [
    kronecker(low_rank(2), low_rank(1), corrected=True),
    kronecker(low_rank(2), low_rank(1), exact_damping=True),
    unit_wise(),
    layer_wise(),
    full(),
    diagonal(),
]


@pytest.mark.parametrize("structure", EXACT)
@pytest.mark.parametrize("case", [MLP, GROUPS], ids=lambda case: case.name)
def test_exact_and_corrected_blocks(structure, case):
    """The effective dimension is the trace of the block's average times its inverse."""
    layers, _ = layers_and_evaluate(case)
    state = trained(precondition_by_fisher(layers, structure, damping=0.05), case)[0][-1]
    for name, layer in diagnose(state, layers).layers.items():
        numbers, inverse = layer.numbers["F"], state.inverses[name]
        lead = state.factors[name].factor_states()[0].steps.ndim
        for _ in range(max(lead - 1, 0)):
            inverse = optree.tree_map(lambda x: x.flatten(0, 1), inverse)
        dense = vmap(to_dense)(inverse) if lead else to_dense(inverse)[None]
        eigenvalues = 1 / torch.linalg.eigvalsh(dense).reshape(-1)
        effective = (1 - numbers["damping"] / eigenvalues).sum()
        torch.testing.assert_close(numbers["effective_dimension"], effective, rtol=1e-5, atol=1e-7)
        condition = eigenvalues.amax() / eigenvalues.amin()
        torch.testing.assert_close(numbers["condition"], condition, rtol=1e-6, atol=0)
        assert numbers["captured"] <= 1 + 1e-9


@pytest.mark.parametrize("kl_clip", [1e-8, 1e8])
def test_a_clip_that_is_active_is_seen(kl_clip):
    """The factor is the same number as in the state, below 1 with the small bound alone."""
    states, _ = trained(low_rank_kfac(LAYERS, 0.1, rank=2, kl_clip=kl_clip), MLP)
    found = diagnose(states[-1], LAYERS)
    factor = found.metrics()["lrkfac/clip_factor"]
    assert (factor < 1) == (kl_clip < 1) and factor > 0
    assert f"clip_factor: {float(factor):.4g}" in str(found).splitlines()


def test_layers_in_turns_are_of_different_age():
    tx, asked = precondition_by_fisher(LAYERS, rank=2), lrkfac.round_robin_refresh(LAYERS, 4)
    state = tx.init(MLP.params)
    for step in range(7):
        e = EVALUATE(MLP.params, layers=asked(step))
        _, state = tx.update(e.grads, state, MLP.params, evaluation=e)
    found, last = diagnose(state, LAYERS), {name: step for step in range(7) for name in asked(step)}
    ages = {name: int(layer.numbers["F"]["since_statistics"]) for name, layer in found.layers.items()}
    assert ages == {name: 6 - step for name, step in last.items()} and len(set(ages.values())) > 1
    assert found.chain["since_statistics"] == max(ages.values())
    assert found.metrics()["lrkfac/0/F/since_statistics"] == ages["0"]


def test_tables():
    rich = pytest.importorskip("rich.console")
    found = diagnose(trained(KFAC, MLP)[0][-1], LAYERS)
    lines, stream = str(found).splitlines(), io.StringIO()
    assert [line.split()[0] for line in lines[2:5]] == ["0", "2", "4"] and "since_statistics: 1" in lines
    rich.Console(file=stream, width=140).print(found)
    assert all(word in stream.getvalue() for word in ("captured", "condition", "since statistics 1", "A | B"))
    assert str(diagnose(KFAC.init(MLP.params), LAYERS))


def test_states_that_do_not_fit_are_refused():
    """Bad values of single arguments: ``tests/test_public_calls.py``."""
    (state, later), rank_1 = trained(KFAC, MLP, steps=1)[0], low_rank_kfac(LAYERS, 0.1, rank=1).init(MLP.params)
    for previous, words in (rank_1, "of the same transformation"), (later, "than state, got a later one"):
        with pytest.raises(ValueError, match=f"previous: expected an earlier state {words}"):
            diagnose(state, LAYERS, previous=previous)
    with pytest.raises(ValueError, match="state: expected"):
        diagnose(state, layers_and_evaluate(GROUPS)[0])
