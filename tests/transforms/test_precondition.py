"""``precondition_by_fisher``: whatever is held is what is applied; tests/test_training_step.py has the reference."""

import optree
import pytest
import torch
from torch.func import vmap

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.linalg import to_dense
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from tests import cases, reference, reference_networks
from tests.described import layers_of
from tests.transforms.test_base import close, trained

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
some_cases = pytest.mark.parametrize("case", [MLP, SHIFT, STRIDE, GROUPS], ids=lambda case: case.name)
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())


def layers_and_evaluate(case, estimator="exact", bias="joint"):
    """The layers of a case, and ``params, statistics=True, noise=None -> Evaluation``."""
    layers = layers_of(case, bias)
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    f = lrkfac.evaluator(case.model, likelihood, layers, estimator)
    return layers, lambda params, **options: f(params, case.inputs, case.targets, **options)


def cast(case, dtype):
    """The case with its floating-point tensors in another dtype."""
    to = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    return case._replace(**optree.tree_map(to, {k: getattr(case, k) for k in ("params", "inputs", "targets")}))


def updates_of(tx, case, evaluate):
    return trained(tx, case.params, evaluate, 1)[0].updates


@some_cases
@each_structure
@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_what_the_state_holds_is_inverted_and_applied(case, structure, damping):
    layers, evaluate = layers_and_evaluate(case)
    tx = lrkfac.chain(precondition_by_fisher(layers, structure, damping=damping, decay=0.8), lrkfac.scale(-0.01))
    *_, (e, updates, (state, _), _) = trained(tx, case.params, evaluate, every=1)
    expected = dict(e.grads)
    for layer in layers:
        dampings = state.dampings[layer.name]
        close(dampings.prod(dim=-1), torch.full((layer.groups,), damping).double().squeeze(), 1e-6)
        operator = structure.fitted(layer.d_in, layer.d_out).operator
        trees = state.factors[layer.name], state.inverses[layer.name]
        factors, inverses = trees if layer.groups > 1 else optree.tree_map(lambda x: x[None], trees)
        matrices = vmap(lambda x, operator=operator: tuple(map(to_dense, operator(x))))(factors)
        inverted = vmap(lambda x: tuple(map(to_dense, x)))(inverses)
        for M, shift, inverse in zip(matrices, dampings.reshape(-1, 2).T, inverted, strict=True):
            eye = torch.eye(M.shape[-1], dtype=M.dtype)
            close(inverse @ (M + shift[:, None, None] * eye), eye.expand_as(M), 1e-6)
        G = reference_networks.gradient_matrix(case, layer.name, e.grads)
        natural = reference.kronecker_preconditioned(G, *reversed(matrices), damping)
        expected.update(reference_networks.layer_gradients(case, layer.name, natural))
    close(updates, {name: -0.01 * u for name, u in expected.items()}, rtol=1e-8)


PATTERNS = [
    ({"0": "dense", "*": "diagonal"}, ["dense", "diagonal", "diagonal"]),
    ({"[02]": "diagonal", "[04]": "dense"}, ["diagonal", "diagonal", "dense"]),
    ({"0": "diagonal", "4": "dense"}, ["diagonal", "low rank", "dense"]),
    ({}, ["low rank", "low rank", "low rank"]),
]


@pytest.mark.parametrize("patterns, chosen", PATTERNS)
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
    fallback = lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.trace(0.9), lrkfac.add_decayed_weights(0.1))
    path, plain = (
        trained(precondition_by_fisher(layers, fallback=inner), SHIFT.params, evaluate) for inner in (fallback, None)
    )
    before, params = fallback.init([SHIFT.params["1.shift"]]), SHIFT.params
    assert torch.equal(plain[0].updates["1.shift"], plain[0].evaluation.grads["1.shift"])
    for e, updates, _, after in path:
        expected, before = fallback.update([e.grads["1.shift"]], before, [params["1.shift"]])
        close(updates["1.shift"], expected, rtol=0)
        params = after
    close(path[0].updates | {"1.shift": plain[0].updates["1.shift"]}, plain[0].updates, rtol=0)


@pytest.mark.parametrize("fallback", [lrkfac.scale_by_adam(), lrkfac.clip_by_global_norm(1.0)])
def test_fallback_without_a_parameter_of_its_own(fallback):
    layers, evaluate = layers_and_evaluate(MLP)
    found = updates_of(precondition_by_fisher(layers, fallback=fallback), MLP, evaluate)
    close(found, updates_of(precondition_by_fisher(layers), MLP, evaluate), rtol=0)


@some_cases
@each_structure
def test_without_statistics_gradients_pass_at_first_and_later_factors_and_inverses_stay(case, structure):
    layers, evaluate = layers_and_evaluate(case)
    tx, e = precondition_by_fisher(layers, structure), evaluate(case.params)
    none = evaluate(case.params, statistics=False)
    passed, _ = tx.update(none.grads, tx.init(case.params), case.params, evaluation=none)
    close(passed, none.grads, rtol=1e-13)
    expected, refreshed = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    assert (refreshed.since == 0).all() and len(refreshed.since) == len(layers)
    updates, kept = tx.update(none.grads, refreshed, case.params, evaluation=none)
    _, again = tx.update(none.grads, kept, case.params, evaluation=none._replace(grads=None))
    for i, state in enumerate((kept, again), 1):
        assert (state.since == i).all()
        assert optree.tree_all(optree.tree_map(torch.equal, state._replace(since=refreshed.since), refreshed))
    close(updates, expected, rtol=1e-10)


@pytest.mark.parametrize("case", [MLP, cases.SEQUENCE[0], *cases.CONVOLUTION], ids=lambda case: case.name)
def test_separate_bias(case):
    """The weight's input factor has no 1; a bias has the factor ``A = [1]`` and the output factor of its layer."""
    layers, evaluate = layers_and_evaluate(case, "empirical", bias="separate")
    found = updates_of(precondition_by_fisher(layers, DENSE, damping=0.03), case, evaluate)
    grads = reference_networks.gradients(case)
    _, inputs = reference_networks.forward(case)
    at_outputs = reference_networks.output_gradients(case)
    terms = reference_networks.number_of_terms(case)

    def natural(G, A, rows):
        B = reference.second_moment(rows) * rows.shape[1] / terms
        return reference.kronecker_preconditioned(G, A, B, 0.03)

    for name, spec in case.layers.items():
        A = reference.second_moment(reference.layer_input_rows(spec._replace(bias=False), inputs[name]))
        G = grads[f"{name}.weight"].reshape(*A.shape[:1], -1, A.shape[-1])
        expected = natural(G, A, reference.layer_output_rows(spec, at_outputs[name]))
        close([found[f"{name}.weight"].reshape(G.shape)], [expected], rtol=1e-10)
        if spec.bias:
            rows = reference.layer_output_rows(spec._replace(options={}), at_outputs[name])
            expected = natural(grads[f"{name}.bias"][None, :, None], torch.ones(1, 1, 1).double(), rows)
            close([found[f"{name}.bias"]], [expected.flatten()], rtol=1e-10)


def test_statistics_of_other_layers_are_refused():
    layers, evaluate = layers_and_evaluate(MLP)
    tx, e = precondition_by_fisher(layers), evaluate(MLP.params)
    e = e._replace(statistics=lrkfac.Statistics({}, {}, torch.ones(())))
    with pytest.raises(ValueError, match="evaluation: no statistics of layer '0'"):
        tx.update(e.grads, tx.init(MLP.params), evaluation=e)
