"""Joint likelihoods of heads with different numbers of examples, each its own."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev

import lrkfac
from lrkfac import evaluator, find_layers, laplacian, precondition_by_fisher, precondition_in_sample_space
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.structures import dense, full, kronecker, layer_wise
from tests.tensors import normal

PARAMS = {"w": normal(4, 2), "b": normal(4), "v": normal(1, 4), "c": normal(1), "only": normal(1, 4)}
WEIGHTS = {"inside": 2.0, "border": 0.5}
LIKELIHOOD = lrkfac.joint({"inside": lrkfac.gaussian(), "border": lrkfac.bernoulli()}, WEIGHTS)


def hidden(p, x):
    return F.linear(x, p["w"], p["b"]).tanh()


def network(p, x):
    return F.linear(hidden(p, x), p["v"], p["c"])


HEADS = {
    "inside": laplacian(network),
    "border": lambda p, x: network(p, x) + hidden(p, x).sin() @ p["only"].T,
}


def model(p, batch):
    return {name: head(p, batch[name]) for name, head in HEADS.items()}


def batch(inside, border):
    x = {"inside": normal(inside, 2), "border": normal(border, 2)}
    return x, {"inside": normal(inside, 1), "border": normal(border, 1).sigmoid()}


X, Y = batch(7, 5)
LAYERS = find_layers(model, PARAMS, X)


def flat(tree):
    return torch.cat([tree[name].flatten() for name in PARAMS])


def reference(x, y):
    """Loss, its gradient, the Fisher matrix and the empirical one, by torch.func alone."""

    def loss(p):
        f = model(p, x)
        border = F.binary_cross_entropy_with_logits(f["border"], y["border"])
        return (f["inside"] - y["inside"]).square().mean() + border / 2

    jacobians = jacrev(model)(PARAMS, x)
    outputs = model(PARAMS, x)
    probability = outputs["border"].sigmoid()
    slopes = {"inside": outputs["inside"] - y["inside"], "border": probability - y["border"]}
    bends = {"inside": torch.ones_like(outputs["inside"]), "border": probability * (1 - probability)}
    exact, empirical = 0, 0
    for name, weight in WEIGHTS.items():
        rows = torch.cat([jacobians[name][k].flatten(1).unflatten(1, (1, -1))[:, 0] for k in PARAMS], 1)
        exact = exact + weight / len(rows) * rows.T @ (bends[name] * rows)
        empirical = empirical + weight / len(rows) * rows.T @ (slopes[name].square() * rows)
    return loss(PARAMS), grad(loss)(PARAMS), exact, empirical


def solved(matrix, gradient):
    return torch.linalg.solve(matrix + 0.01 * torch.eye(len(matrix), dtype=matrix.dtype), flat(gradient))


def stepped(tx, evaluation):
    return flat(tx.update(evaluation.grads, tx.init(PARAMS), PARAMS, evaluation=evaluation)[0])


@pytest.mark.parametrize("lengths", [(7, 5), (3, 6)])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_against_explicit_matrices(estimator, lengths):
    x, y = batch(*lengths)
    loss, gradient, exact, empirical = reference(x, y)
    evaluation = evaluator(model, LIKELIHOOD, LAYERS, estimator)(PARAMS, x, y)
    torch.testing.assert_close(evaluation.loss, loss)
    torch.testing.assert_close(lrkfac.materialize(evaluation.grads), gradient)
    tangent = {name: p.cos() for name, p in PARAMS.items()}
    torch.testing.assert_close(flat(evaluation.product(tangent)), exact @ flat(tangent))
    torch.testing.assert_close(evaluation.quadratic(tangent, tangent), flat(tangent) @ exact @ flat(tangent))
    expected = solved(exact if estimator == "exact" else empirical, gradient)
    torch.testing.assert_close(stepped(precondition_by_fisher(LAYERS, full(), damping=0.01), evaluation), expected)
    if estimator == "exact":
        tx = precondition_in_sample_space(LAYERS, damping=0.01)
        torch.testing.assert_close(stepped(tx, evaluation), expected)
    for structure in (layer_wise(), kronecker(dense(), dense(), treatment="reduce"), kronecker(dense(), dense())):
        assert stepped(precondition_by_fisher(LAYERS, structure, damping=0.01), evaluation).isfinite().all()


def test_drawn_rows_are_those_of_each_head():
    noise = {name: torch.rand(1, len(x), 1, dtype=torch.float64) for name, x in X.items()}
    statistics = evaluator(model, LIKELIHOOD, LAYERS)(PARAMS, X, Y, noise=noise).statistics
    for part, (name, head) in enumerate(HEADS.items()):
        evaluate = evaluator(head, LIKELIHOOD.tree[name], find_layers(head, PARAMS, X[name]))
        alone = evaluate(PARAMS, X[name], Y[name], noise=noise[name]).statistics
        factor = (7 * WEIGHTS[name] / len(X[name])) ** 0.5
        for layer in ("w", "v"):
            both = statistics.output_gradients[layer]
            torch.testing.assert_close(both[part], factor * alone.output_gradients[layer][0])
    assert statistics.scale == 1 / 7


def test_factors_of_each_use_are_joined():
    statistics = evaluator(model, LIKELIHOOD, LAYERS, "exact")(PARAMS, X, Y).statistics
    inputs, gradients = statistics.inputs["v"], statistics.output_gradients["v"]
    reduced = kronecker_factors(LAYERS["v"], inputs, gradients, statistics.scale, "reduce")
    means = torch.cat([a.reshape(len(a), -1, 5).mean(1) for a in inputs])
    sums = torch.cat([g.flatten(2, -2).sum(2).flatten(0, 1) if g.ndim > 3 else g.flatten(0, 1) for g in gradients])
    torch.testing.assert_close(reduced[1].dense(), means.T @ means / 12)
    torch.testing.assert_close(reduced[0].dense(), sums.T @ sums / 7)


def test_layers_know_whose_examples_they_see():
    assert LAYERS.own and LAYERS.independent and LAYERS.single and all(layer.by_example for layer in LAYERS)
    assert dict(LAYERS.batch_axes) == {"inside": 0, "border": 0}

    def dependent(p, b):
        return {**model(p, b), "border": network(p, b["border"]) * b["inside"].mean()}

    assert find_layers(dependent, PARAMS, X).independent is False

    def together(p, b):
        inside, border = network(p, torch.cat([b["inside"], b["border"]])).split([len(b["inside"]), len(b["border"])])
        return {"inside": inside, "border": border}

    layers = find_layers(together, PARAMS, X)
    assert layers.own and not any(layer.by_example for layer in layers)
    assert evaluator(together, LIKELIHOOD, layers)(PARAMS, X, Y).statistics is not None


def test_heads_that_share_examples_have_as_many_outputs():
    def folded(p, x):
        return {"inside": network(p, x).repeat_interleave(2, 0), "border": network(p, x)}

    x, y = X["border"], {"inside": normal(10, 1), "border": Y["border"]}
    layers = find_layers(folded, PARAMS, x)
    assert evaluator(folded, LIKELIHOOD, layers)(PARAMS, x, y, statistics=False).loss.isfinite()
    with pytest.raises(ValueError, match="with the same batch axis in front, or heads with examples of their own"):
        evaluator(folded, LIKELIHOOD, layers)(PARAMS, x, y)
    with pytest.raises(ValueError, match="examples: expected"):
        evaluator(model, LIKELIHOOD, LAYERS)(PARAMS, X, Y, examples=torch.tensor([0, 1]))


WHOLE = {"w": normal(4, 2), "b": normal(4), "v": normal(1, 4), "c": normal(1), "only": normal(1, 4), "s": normal(1)}


def scaled(p, x):
    """A head that no operation covers in one parameter, beside a plain one."""
    outputs = model(p, x)
    return {"inside": outputs["inside"] * p["s"].exp(), "border": outputs["border"] + p["s"].sin()}


UNITED = {
    "dense": ("exact", lambda: precondition_by_fisher(LAYERS, structure=kronecker(dense(), dense()))),
    "full": ("exact", lambda: precondition_by_fisher(LAYERS, structure=full())),
    "empirical": ("empirical", lambda: precondition_by_fisher(LAYERS, structure=layer_wise())),
    "sample space": ("exact", lambda: precondition_in_sample_space(LAYERS, 0.01)),
}


@pytest.mark.parametrize("estimator, make", UNITED.values(), ids=UNITED)
def test_micro_batches_of_the_same_proportions_are_one_batch(estimator, make):
    parts = [(X, Y), batch(14, 10)]
    whole = [{name: torch.cat([part[i][name] for part in parts]) for name in HEADS} for i in (0, 1)]
    evaluate = evaluator(model, LIKELIHOOD, LAYERS, estimator)
    merged = lrkfac.merge_evaluations([evaluate(PARAMS, *part) for part in parts])
    expected = evaluate(PARAMS, *whole)
    torch.testing.assert_close(merged.loss, expected.loss)
    torch.testing.assert_close(stepped(make(), merged), stepped(make(), expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sizes", [((3, 5), (3, 5)), ((5, 3), (10, 6))], ids=str)
@pytest.mark.parametrize(
    "make", [lambda x: precondition_in_sample_space(x, 0.1), lambda x: precondition_by_fisher(x, full())]
)
def test_whole_parameters_are_merged_by_head(make, sizes):
    layers = find_layers(scaled, WHOLE, batch(7, 5)[0], uncovered="jacobian")
    assert [layer.name for layer in layers.jacobians] == ["s"]
    parts = [batch(*size) for size in sizes]
    whole = [{name: torch.cat([part[i][name] for part in parts]) for name in HEADS} for i in (0, 1)]
    evaluate, tx = evaluator(scaled, LIKELIHOOD, layers, "exact"), make(layers)

    def step(evaluation):
        updates, _ = tx.update(evaluation.grads, tx.init(WHOLE), WHOLE, evaluation=evaluation)
        return torch.cat([updates[name].flatten() for name in WHOLE])

    merged = lrkfac.merge_evaluations([evaluate(WHOLE, *part) for part in parts])
    torch.testing.assert_close(step(merged), step(evaluate(WHOLE, *whole)), rtol=1e-8, atol=1e-10)
