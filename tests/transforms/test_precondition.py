"""``precondition_by_fisher``: dense factors equal the reference, whatever is held is what is applied."""

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from tests import cases, reference, reference_networks
from tests.transforms.test_base import close

DENSE = kronecker(dense(), dense())
STRUCTURES = {
    "dense": DENSE,
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(1)),
    "swapped": kronecker(low_rank_plus_diagonal(1), low_rank(2)),
    "diagonal": kronecker(diagonal(), diagonal()),
    "mixed": kronecker(low_rank(1, residual="none"), dense()),
    "by power iteration": kronecker(low_rank(2, method="power"), low_rank_plus_diagonal(1, fit="off_diagonal")),
}
MLP, SHIFT, STRIDE, GROUPS = cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[0], cases.CONVOLUTION[3]
each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
some_cases = pytest.mark.parametrize("case", [MLP, SHIFT, STRIDE, GROUPS], ids=lambda case: case.name)
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


def layers_and_evaluate(case, estimator="exact", bias="joint"):
    """The layers of a case, and ``params, statistics=True, noise=None -> Evaluation``."""
    layers = lrkfac.find_layers(case.model, case.params, case.inputs, bias=bias)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    f = lrkfac.evaluator(case.model, likelihood, layers, estimator)
    return layers, lambda params, **options: f(params, case.inputs, case.targets, **options)


def cast(case, dtype):
    """The case with its floating-point tensors in another dtype."""
    to = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    return case._replace(**optree.tree_map(to, {k: getattr(case, k) for k in ("params", "inputs", "targets")}))


def updates_of(tx, case, evaluate, steps=1, **options):
    """The updates of the last of some steps at fixed parameters."""
    state = tx.init(case.params)
    for _ in range(steps):
        e = evaluate(case.params, **options)
        updates, state = tx.update(e.grads, state, case.params, evaluation=e)
    return updates


@each_case
@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_dense_factors_equal_the_reference(case, estimator):
    """Over three refreshes, with a step on the old inverses after each."""
    layers, evaluate = layers_and_evaluate(case, estimator)
    tx, reached = precondition_by_fisher(layers, DENSE, damping=0.03, decay=0.8), None
    state = tx.init(case.params)
    for _ in range(3):
        e = evaluate(case.params)
        updates, state = tx.update(e.grads, state, case.params, evaluation=e)
        step = reference_networks.dense_kfac_step(case, reached, estimator=estimator, damping=0.03, decay=0.8)
        close({k: updates[k] for k in step.preconditioned}, step.preconditioned, rtol=1e-10)
        case, reached = case._replace(params=step.params), step.state
        e = evaluate(case.params, statistics=False)
        updates, state = tx.update(e.grads, state, case.params, evaluation=e)
        grads = reference_networks.gradients(case)
        stale = reference_networks.preconditioned_gradients(case, grads, reached.averages, 0.03)
        close({k: updates[k] for k in stale}, stale, rtol=1e-10)


@some_cases
@each_structure
@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_what_the_state_holds_is_inverted_and_applied(case, structure, damping):
    layers, evaluate = layers_and_evaluate(case)
    tx = precondition_by_fisher(layers, structure, damping=damping, decay=0.8)
    state, params = tx.init(case.params), case.params
    for _ in range(3):
        e = evaluate(params)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = optree.tree_map(lambda p, g: p - 0.1 * g, params, e.grads)
    expected = dict(e.grads)
    for layer in layers:
        close(state.dampings[layer.name].prod(dim=-1), torch.full((layer.groups,), damping).double().squeeze(), 1e-6)
        fitted = structure.fitted(layer.d_in, layer.d_out)

        def factors(state, fitted=fitted):
            return optree.tree_map(to_dense, tuple(fitted.operator(state)), is_leaf=_is_operator)

        held = state.factors[layer.name]
        one = optree.tree_map(lambda x: x[None], held) if layer.groups == 1 else held
        B, A = vmap(factors)(one)
        inverses = state.inverses[layer.name]
        inverses = optree.tree_map(lambda x: x[None], inverses) if layer.groups == 1 else inverses
        inverted = vmap(lambda i: optree.tree_map(to_dense, tuple(i), is_leaf=_is_operator))(inverses)
        for M, shift, inverse in zip((B, A), state.dampings[layer.name].reshape(-1, 2).T, inverted, strict=True):
            found = inverse @ (M + shift[:, None, None] * torch.eye(M.shape[-1], dtype=M.dtype))
            close(found, torch.eye(M.shape[-1], dtype=M.dtype).expand_as(found), 1e-6)
        G = reference_networks.gradient_matrix(case, layer.name, e.grads)
        natural = reference.kronecker_preconditioned(G, A, B, damping)
        expected.update(reference_networks.layer_gradients(case, layer.name, natural))
    close(updates, expected, rtol=1e-8)


def _is_operator(x):
    return isinstance(x, lrkfac.linalg.Dense | lrkfac.linalg.Diagonal | lrkfac.linalg.LowRankPlusDiagonal)


@pytest.mark.parametrize(
    "patterns, chosen",
    [
        ({"0": "dense", "*": "diagonal"}, ["dense", "diagonal", "diagonal"]),
        ({"[02]": "diagonal", "[04]": "dense"}, ["diagonal", "diagonal", "dense"]),
        ({"[24]": "diagonal"}, ["low rank", "diagonal", "diagonal"]),
        ({"0": "diagonal", "4": "dense"}, ["diagonal", "low rank", "dense"]),
        ({}, ["low rank", "low rank", "low rank"]),
    ],
)
def test_structure_by_name_pattern(patterns, chosen):
    """The first pattern that matches counts; layers without one get the default."""
    structures = {**STRUCTURES, "low rank": kronecker(low_rank(1), low_rank_plus_diagonal(1))}
    layers, evaluate = layers_and_evaluate(MLP)
    rank = {"rank": 1} if "low rank" in chosen else {}
    tx = precondition_by_fisher(layers, {p: structures[name] for p, name in patterns.items()}, **rank)
    found = updates_of(tx, MLP, evaluate)
    for layer, name in zip(layers, chosen, strict=True):
        alone = updates_of(precondition_by_fisher(layers, structures[name]), MLP, evaluate)
        for path in (layer.weight.path, layer.bias.path):
            assert torch.equal(found[path], alone[path])


def test_uncovered_parameters_pass_or_take_the_fallback():
    layers, evaluate = layers_and_evaluate(SHIFT)
    assert [p.path for p, _ in layers.uncovered] == ["1.shift"]
    grads = evaluate(SHIFT.params).grads
    plain = updates_of(precondition_by_fisher(layers), SHIFT, evaluate)
    assert torch.equal(plain["1.shift"], grads["1.shift"])
    fallback = lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.trace(0.9), lrkfac.add_decayed_weights(0.1))
    found = updates_of(precondition_by_fisher(layers, fallback=fallback), SHIFT, evaluate, steps=3)
    state, own = fallback.init([SHIFT.params["1.shift"]]), [grads["1.shift"]]
    for _ in range(3):
        (expected,), state = fallback.update(own, state, [SHIFT.params["1.shift"]])
    assert torch.equal(found.pop("1.shift"), expected)
    plain = updates_of(precondition_by_fisher(layers), SHIFT, evaluate, steps=3)
    close(found, {k: u for k, u in plain.items() if k != "1.shift"}, rtol=0)


@pytest.mark.parametrize("fallback", [lrkfac.scale_by_adam(), lrkfac.clip_by_global_norm(1.0)])
def test_fallback_without_a_parameter_of_its_own(fallback):
    layers, evaluate = layers_and_evaluate(MLP)
    found = updates_of(precondition_by_fisher(layers, fallback=fallback), MLP, evaluate)
    close(found, updates_of(precondition_by_fisher(layers), MLP, evaluate), rtol=0)


@some_cases
@each_structure
def test_before_the_first_statistics_gradients_pass(case, structure):
    layers, evaluate = layers_and_evaluate(case)
    tx = precondition_by_fisher(layers, structure)
    found = updates_of(tx, case, evaluate, statistics=False)
    close(found, evaluate(case.params, statistics=False).grads, rtol=1e-13)


@some_cases
@each_structure
def test_without_statistics_factors_and_inverses_stay(case, structure):
    layers, evaluate = layers_and_evaluate(case)
    tx = precondition_by_fisher(layers, structure)
    e = evaluate(case.params)
    _, refreshed = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    e = evaluate(case.params, statistics=False)
    updates, kept = tx.update(e.grads, refreshed, case.params, evaluation=e)
    assert (kept.since == 1).all() and (refreshed.since == 0).all() and len(kept.since) == len(layers)
    assert optree.tree_all(optree.tree_map(torch.equal, kept._replace(since=refreshed.since), refreshed))
    _, again = tx.update(e.grads, kept, case.params, evaluation=e._replace(grads=None))
    assert (again.since == 2).all()
    assert optree.tree_all(optree.tree_map(torch.equal, again._replace(since=refreshed.since), refreshed))
    close(updates, updates_of(tx, case, evaluate), rtol=1e-10)


@pytest.mark.parametrize("case", [MLP, cases.SEQUENCE[0], *cases.CONVOLUTION], ids=lambda case: case.name)
def test_separate_bias(case):
    """The weight's input factor has no 1; a bias has the factor ``A = [1]`` and the output factor of its layer."""
    layers, evaluate = layers_and_evaluate(case, "empirical", bias="separate")
    found = updates_of(precondition_by_fisher(layers, DENSE, damping=0.03), case, evaluate)
    grads = reference_networks.gradients(case)
    _, inputs = reference_networks.forward(case)
    at_outputs = reference_networks.output_gradients(case)
    terms = reference_networks.number_of_terms(case)
    for name, spec in case.layers.items():
        rows = reference.layer_input_rows(spec._replace(bias=False), inputs[name])
        g = reference.layer_output_rows(spec, at_outputs[name])
        B = torch.einsum("gri,grj->gij", g, g) / terms
        G = grads[f"{name}.weight"].reshape(spec.groups, B.shape[-1], -1)
        natural = reference.kronecker_preconditioned(G, reference.second_moment(rows), B, 0.03)
        close([found[f"{name}.weight"].reshape(G.shape)], [natural], rtol=1e-10)
        if spec.bias:
            g = reference.layer_output_rows(
                spec._replace(options={k: v for k, v in spec.options.items() if k != "groups"}), at_outputs[name]
            )
            B, G = torch.einsum("gri,grj->gij", g, g) / terms, grads[f"{name}.bias"][None, :, None]
            natural = reference.kronecker_preconditioned(G, torch.ones(1, 1, 1).double(), B, 0.03)
            close([found[f"{name}.bias"]], [natural.flatten()], rtol=1e-10)


@pytest.mark.parametrize("structure", [DENSE, STRUCTURES["low rank"]], ids=["dense", "low rank"])
def test_damping_and_decay_may_be_tensors(structure):
    layers, evaluate = layers_and_evaluate(GROUPS)
    numbers = precondition_by_fisher(layers, structure, damping=0.03, decay=0.8)
    expected = updates_of(numbers, GROUPS, evaluate, steps=3)

    def mapped(damping, decay):
        tx = precondition_by_fisher(layers, structure, damping=damping, decay=decay)
        return updates_of(tx, GROUPS, evaluate, steps=3)

    values = torch.tensor([[0.03, 0.5], [0.8, 0.0]], dtype=torch.float64)
    close(mapped(*values[:, 0]), expected, rtol=1e-10)
    close(optree.tree_map(lambda x: x[0], vmap(mapped)(*values)), expected, rtol=1e-10)


def test_statistics_of_other_layers_are_refused():
    layers, evaluate = layers_and_evaluate(MLP)
    tx, e = precondition_by_fisher(layers), evaluate(MLP.params)
    e = e._replace(statistics=lrkfac.Statistics({}, {}, torch.ones(())))
    with pytest.raises(ValueError, match="evaluation: no statistics of layer '0'"):
        tx.update(e.grads, tx.init(MLP.params), evaluation=e)
