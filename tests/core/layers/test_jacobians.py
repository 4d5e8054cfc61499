"""Parameters that are layers as a whole: what any differentiable model computes with them, against dense Jacobians."""

import copy
import pickle
from dataclasses import replace

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev, vmap

import lrkfac
from lrkfac import evaluator, find_layers, precondition_by_fisher, precondition_in_sample_space
from lrkfac.core.evaluation.by_example import example_transpose
from lrkfac.structures import diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal
from tests.compiling import traced
from tests.core.layers.test_mapped_layers import BATCHED, DERIVATIVES, P, X, explicit, flat, net, normal

EYE = torch.eye(sum(leaf.numel() for leaf in P.values()), dtype=torch.float64)
INDEPENDENT = [name for name in DERIVATIVES if not name.startswith("inner step")]


def close(x, expected, rtol=1e-9):
    torch.testing.assert_close(x, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def exact_step(model, layers, damping=0.1):
    """In the space of samples."""
    _, targets, _, _ = explicit(model)
    e = evaluator(model, lrkfac.gaussian(), layers, "exact")(P, X.clone(), targets)
    tx = precondition_in_sample_space(layers, damping)
    return flat(tx.update(e.grads, tx.init(P), P, evaluation=e)[0])


@pytest.mark.parametrize("name", INDEPENDENT)
def test_the_step_of_any_model_is_that_of_the_dense_matrix(name):
    model = DERIVATIVES[name][0]
    layers = find_layers(model, P, X.clone(), strict=True, uncovered="jacobian")
    assert {layer.kind for layer in layers} == {"jacobian"} and not layers.uncovered
    assert layers.alone == (name not in ("value and gradient", "Laplacian", "dual numbers"))
    _, targets, gradient, matrix = explicit(model)
    for damping in (0.1, 1e-5):
        close(exact_step(model, layers, damping), torch.linalg.solve(matrix + damping * EYE, gradient))
    e = evaluator(model, lrkfac.gaussian(), layers, "exact")(P, X.clone(), targets)
    tx = precondition_by_fisher(layers, full(), damping=0.1)
    updates = tx.update(e.grads, tx.init(P), P, evaluation=e)[0]
    close(flat(updates), torch.linalg.solve(matrix + 0.1 * EYE, gradient))


@pytest.mark.parametrize("name", ["hessian", "value and gradient"])
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_both_ways_give_the_gradients_of_single_examples(name, estimator):
    """Through the model mapped over examples, and one by one through the batch; also of some examples."""
    model = DERIVATIVES[name][0]
    layers = find_layers(model, P, X.clone(), uncovered="jacobian")
    outputs, targets, gradient, _ = explicit(model)
    evaluate = evaluator(model, lrkfac.gaussian(), layers, estimator)
    noise = torch.rand(1, *outputs.shape, dtype=torch.float64) if estimator == "mc" else None
    e = evaluate(P, X.clone(), targets, noise=noise)
    close(flat(e.grads), gradient)
    leaves = [leaf.clone().requires_grad_() for leaf in P.values()]
    f = model(dict(zip(P, leaves, strict=True)), X.clone())
    columns = {
        "exact": torch.eye(f.shape[1], dtype=f.dtype)[:, None].expand(-1, len(f), -1),
        "mc": None if noise is None else (outputs - lrkfac.gaussian().sample(outputs, noise[0]))[None],
        "empirical": (f - targets).detach()[None],
    }[estimator]
    for k, column in enumerate(columns):
        for n, cotangent in enumerate(column):
            expected = torch.autograd.grad(f[n], leaves, cotangent, retain_graph=True, materialize_grads=True)
            for key, part in zip(P, expected, strict=True):
                close(e.statistics.output_gradients[key][0][k, n], part.flatten())
    some = torch.tensor([3, 1])
    e = evaluate(P, X.clone(), targets, examples=some, noise=None if noise is None else noise[:, some])
    whole = evaluate(P, X.clone(), targets, noise=noise)
    for key in P:
        close(e.statistics.output_gradients[key][0], whole.statistics.output_gradients[key][0][:, some])


def mixed(p, x):
    """A network whose last layer is one, and whose others are not: their derivatives are taken."""
    features = vmap(grad(lambda row: net(p, row).sum()))(x)
    return F.linear(torch.cat([features, x], dim=1).tanh(), p["outer"], p["shift"]) * p["temperature"].exp()


Q = {**P, "outer": normal(3, 4, seed=20), "shift": normal(3, seed=21), "temperature": normal(seed=22) / 4}


def test_beside_layers_that_are_covered():
    layers = find_layers(mixed, Q, X, strict=True, uncovered="jacobian")
    assert [layer.kind for layer in layers] == ["linear", *["jacobian"] * 6] and "temperature" in str(layers)
    targets = normal(len(X), 3, seed=7)
    e = evaluator(mixed, lrkfac.gaussian(), layers, "exact")(Q, X, targets)
    parts = jacrev(lambda p: mixed(p, X))(Q)
    J = torch.cat([parts[key].reshape(3 * len(X), -1) for key in sorted(Q)], dim=1)
    flattened = lambda tree: torch.cat([leaf.flatten() for _, leaf in sorted(tree.items())])  # noqa: E731
    gradient = J.mT @ (mixed(Q, X) - targets).flatten() / len(X)
    eye = torch.eye(J.shape[1], dtype=J.dtype)
    expected = torch.linalg.solve(J.mT @ J / len(X) + 1e-3 * eye, gradient)
    for tx in (
        precondition_in_sample_space(layers, 1e-3),
        precondition_by_fisher(layers, full(), damping=1e-3, decay=0.0),
    ):
        close(flattened(tx.update(e.grads, tx.init(Q), Q, evaluation=e)[0]), expected, 1e-8)
    close(flattened(e.grads), gradient)
    blocks = precondition_by_fisher(layers, layer_wise(), damping=0.1)
    natural = blocks.update(e.grads, blocks.init(Q), Q, evaluation=e)[0]
    rows = parts["w1"].reshape(3 * len(X), -1)
    block = rows.mT @ rows / len(X) + 0.1 * torch.eye(rows.shape[1], dtype=rows.dtype)
    close(natural["w1"].flatten(), torch.linalg.solve(block, e.grads["w1"].flatten()))


@pytest.mark.parametrize("structure", [None, diagonal(), kronecker(low_rank(2), low_rank_plus_diagonal(3))])
def test_structures_and_chains_take_them(structure):
    layers = find_layers(mixed, Q, X, uncovered="jacobian")
    targets = normal(len(X), 3, seed=7)
    evaluate = evaluator(mixed, lrkfac.gaussian(), layers, "exact")
    e = evaluate(Q, X, targets)
    tx = lrkfac.scale_by_quadratic_model(precondition_by_fisher(layers, structure, damping=0.1))
    updates, _ = tx.update(e.grads, tx.init(Q), Q, evaluation=e)
    assert e.loss_at(lrkfac.apply_updates(Q, updates)) < e.loss
    parts = [evaluate(Q, X[i:j], targets[i:j]) for i, j in ((0, 2), (2, 5))]
    merged = lrkfac.merge_evaluations(parts)
    for key in Q:
        close(merged.grads[key], e.grads[key])
    tx = precondition_by_fisher(layers, structure, damping=0.1, decay=0.0)
    both = [tx.update(one.grads, tx.init(Q), Q, evaluation=one)[0] for one in (e, merged)]
    optree.tree_map(lambda x, y: close(lrkfac.materialize(x), lrkfac.materialize(y), 1e-7), *both)


def test_heads_with_examples_of_their_own():
    """Points within a domain and on its boundary, as many as there are of each."""

    def model(p, points):
        return {
            "inside": vmap(lambda x: hessian(lambda x: net(p, x)[0])(x).trace())(points["inside"])[:, None],
            "border": net({**p, "w1": p["w1"].clone()}, points["border"]),
        }

    points = {"inside": normal(5, 2, seed=30), "border": normal(3, 2, seed=31)}
    targets = {"inside": normal(5, 1, seed=32), "border": normal(3, 1, seed=33)}
    layers = find_layers(model, P, points, strict=True, uncovered="jacobian")
    assert layers.own and layers.alone
    likelihood = lrkfac.joint(dict.fromkeys(points, lrkfac.gaussian()), {"inside": 1.0, "border": 9.0})
    e = evaluator(model, likelihood, layers, "exact")(P, points, targets)
    jacobians = {k: torch.cat([j[name].flatten(2).flatten(0, 1) for name in P], 1) for k, j in
                 jacrev(lambda p: model(p, points))(P).items()}  # fmt: skip
    F_ = jacobians["inside"].mT @ jacobians["inside"] / 5 + 9 * jacobians["border"].mT @ jacobians["border"] / 3
    tx = precondition_in_sample_space(layers, 1e-2)
    updates, _ = tx.update(e.grads, tx.init(P), P, evaluation=e)
    close(flat(updates), torch.linalg.solve(F_ + 1e-2 * EYE, flat(e.grads)))


def test_a_model_that_divides_by_the_number_of_examples_goes_through_the_batch():
    """Alone, an example would have another output, of the same shape."""
    model = lambda p, x: grad(lambda x: net(p, x).mean())(x)  # noqa: E731
    for x in (X, X[:1]):
        layers = find_layers(model, P, x, uncovered="jacobian")
        assert layers.independent and not layers.alone
    _, _, gradient, matrix = explicit(model)
    close(exact_step(model, layers), torch.linalg.solve(matrix + 0.1 * EYE, gradient))


def test_other_sizes_of_batches_and_copies():
    model = DERIVATIVES["hessian"][0]
    layers = find_layers(model, P, X[:2], uncovered="jacobian")
    _, _, gradient, matrix = explicit(model)
    expected = torch.linalg.solve(matrix + 0.1 * EYE, gradient)
    for one in (layers, copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        close(exact_step(model, one), expected)
    assert find_layers(model, P, X, uncovered="jacobian") == layers


def test_a_part_without_examples():
    """One of several processes may have none."""
    model = lambda p, x: vmap(lambda row: net(p, row).exp() + p["s"].exp().sum())(x)  # noqa: E731
    layers = find_layers(model, P, X, uncovered="jacobian")
    assert [layer.kind for layer in layers] == ["linear", "linear", "jacobian"]
    evaluate = evaluator(model, lrkfac.gaussian(), layers, "exact")
    heads = replace(evaluate.objective.heads, part=True)
    back = example_transpose(replace(evaluate.objective, heads=heads), layers, P, X[:0], [X[:0, :1]])
    assert {name: g.shape for name, (g,) in back([X[:0, :1]]).items()} == {"s": (0, 2)}


def test_what_is_covered_stays_as_it_is():
    model = BATCHED["rows"]
    assert find_layers(model, P, X, uncovered="jacobian") == find_layers(model, P, X)
    unused = {**P, "more": normal(3), "none": normal(0)}
    layers = find_layers(model, unused, X, uncovered="jacobian")
    assert {p.path: reason for p, reason in layers.uncovered} == {
        "more": "not used by the model",
        "none": "it has no entries",
    }


def test_refusals(monkeypatch):
    for model in (DERIVATIVES["inner step"][0], lambda p, x: net(p, x).flatten().sin() * p["s"].exp().sum() + x.sum()):
        with pytest.raises(ValueError, match=r'uncovered: expected "plain" for a model whose outputs of one'):
            find_layers(model, P, X, uncovered="jacobian")
    with pytest.raises(ValueError, match=r"uncovered: expected one of \('plain', 'jacobian'\), got 'rows'"):
        find_layers(net, P, X, uncovered="rows")
    model = DERIVATIVES["hessian"][0]
    with pytest.warns(UserWarning, match='uncovered="jacobian"'):
        none = find_layers(model, P, X)
    with pytest.raises(ValueError, match=r'layers: expected at least one layer.*uncovered="jacobian"'):
        precondition_in_sample_space(none)
    evaluate = evaluator(model, lrkfac.gaussian(), find_layers(model, P, X, uncovered="jacobian"), "exact")
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"gradients of 5 examples in 5 .* for 4 columns each, take 4,320 bytes, mo"):
        evaluate(P, X, normal(5, 4))


COMPILED = {
    "forward": DERIVATIVES["jvp"][0],
    "twice backward": lambda p, x: vmap(jacrev(jacrev(lambda row: net(p, row)[0])))(x).flatten(1),
}  # torch compiles no forward derivative of a backward one, so no hessian()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name):
    torch.compiler.reset()
    model = COMPILED[name]
    layers = find_layers(model, P, X, uncovered="jacobian")
    targets = model(P, X).cos()
    evaluate = evaluator(model, lrkfac.gaussian(), layers, "exact")
    tx = precondition_in_sample_space(layers, 1e-2)

    def step(params):
        e = evaluate(params, X, targets)
        return tx.update(e.grads, tx.init(params), params, evaluation=e)[0]

    close(flat(traced(step)(P)), flat(step(P)))


def test_under_vmap_over_an_ensemble():
    model = DERIVATIVES["jvp"][0]
    layers = find_layers(model, P, X, uncovered="jacobian")
    _, targets, _, _ = explicit(model)
    evaluate = evaluator(model, lrkfac.gaussian(), layers, "exact")
    tx = precondition_in_sample_space(layers, 1e-2)

    def step(params):
        e = evaluate(params, X, targets)
        return tx.update(e.grads, tx.init(params), params, evaluation=e)[0]

    members = [optree.tree_map(lambda leaf, i=i: leaf * (1 + 0.1 * i), P) for i in range(2)]
    found = vmap(step)(optree.tree_map(lambda *x: torch.stack(x), *members))
    for i, one in enumerate(members):
        close(flat({k: v[i] for k, v in found.items()}), flat(step(one)))


DIFFERENT_ALONE = {
    "a small output beside a large one": lambda p, x: torch.cat(
        [1e5 * x @ p["w"].exp().mT, x @ p["w"].sin().mT / len(x)], 1
    ),
    "a small term": lambda p, x: (x @ p["w"].exp().mT) * (1 + 1e-4 * len(x)),
}


@pytest.mark.parametrize("model", DIFFERENT_ALONE.values(), ids=DIFFERENT_ALONE)
def test_a_model_whose_examples_differ_alone_is_not_mapped(model):
    params, x = {"w": normal(2, 3)}, normal(6, 3)
    layers = find_layers(model, params, x, uncovered="jacobian")
    assert not layers.alone and "the model cannot be mapped" in str(layers)
    assert find_layers(lambda p, x: x @ p["w"].exp().mT, params, x, uncovered="jacobian").alone
