"""Influences against gradients of single examples and the dense inverse."""

import pytest
import torch
from torch import nn

import lrkfac
from lrkfac.curvature import estimate, influence
from lrkfac.structures import dense, full, kronecker, low_rank, low_rank_plus_diagonal
from tests import cases
from tests.core.inference.test_estimate import arguments
from tests.tensors import close

MLP, GROUPS, SEQUENCE = cases.LINEAR[0], cases.CONVOLUTION[3], cases.SEQUENCE[0]
STRUCTURES = {
    "full": full(),
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(1)),
    "dense": kronecker(dense(), dense()),
}
CASES = [(MLP, "full"), (MLP, "low rank"), (GROUPS, "low rank"), (SEQUENCE, "low rank"), (MLP, "dense")]


def expected(model, params, x, y, likelihood, fisher, damping):
    """``g_qᵀ (F + λ I)⁻¹ g_n`` by the gradient of the loss of each example, in the order of the leaves."""
    names = sorted(params)
    gradients = []
    for n in range(len(x)):
        of_one = torch.func.grad(lambda p, n=n: likelihood.loss(model(p, x[n : n + 1]), y[n : n + 1]))(params)
        gradients.append(torch.cat([of_one[name].reshape(-1) for name in names]))
    G, M = torch.stack(gradients), fisher.to_dense()
    return G @ torch.linalg.solve(M + damping * torch.eye(len(M), dtype=M.dtype), G.mT)


@pytest.mark.parametrize("case, name", CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_it_is_the_product_of_gradients_with_the_dense_inverse(case, name, monkeypatch):
    monkeypatch.setattr("lrkfac.core.inference.influence.LARGEST", 1)
    evaluate, params, batches, layers = arguments(case, [len(case.inputs)])
    likelihood = getattr(lrkfac, case.likelihood)(**case.likelihood_options)
    at_targets = lrkfac.evaluator(case.model, likelihood, layers, "empirical")
    fisher = estimate(evaluate, params, batches, layers, STRUCTURES[name])
    parts = [at_targets(params, x, y) for x, y in zip(case.inputs.split(2), case.targets.split(2), strict=True)]
    found = influence(fisher, parts[0], parts, 0.1)
    whole = expected(case.model, params, case.inputs, case.targets, likelihood, fisher, 0.1)
    close(found, whole[:2], rtol=1e-8)
    assert torch.equal(found[:, :2], influence(fisher, parts[0].statistics, parts[0], 0.1))


def test_rows_of_an_embedding_are_picked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Linear(12, 2)).double()
    model, params = lrkfac.from_module(net)
    x, y = torch.randint(5, (6, 4)), torch.randint(2, (6,))
    layers, likelihood = lrkfac.find_layers(model, params, x), lrkfac.categorical()
    exact, at_targets = (lrkfac.evaluator(model, likelihood, layers, e) for e in ("exact", "empirical"))
    fisher = estimate(exact, params, [(x, y)], layers, rank=1)
    found = influence(fisher, at_targets(params, x, y), at_targets(params, x, y), 0.1)
    close(found, expected(model, params, x, y, likelihood, fisher, 0.1), rtol=1e-8)


BAD = {
    "damping: expected": {"damping": 0},
    "curvature: expected": {"curvature": 1},
    "queries: expected an Evaluation": {"queries": 1},
    "examples: expected at least one": {"examples": []},
    "one gradient for each example": {"queries": "exact"},
    "without": {"queries": "none"},
    "exact: expected": {"exact": 1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    evaluate, params, ((x, y),), layers = arguments(MLP, [7])
    fisher = estimate(evaluate, params, [(x, y)], layers, STRUCTURES["dense"])
    e = lrkfac.evaluator(MLP.model, lrkfac.categorical(), layers, "empirical")(params, x, y)
    given = {"curvature": fisher, "queries": e, "examples": e, "damping": 0.1} | BAD[message]
    others = {"exact": evaluate(params, x, y), "none": e._replace(statistics=None)}
    if isinstance(given["queries"], str):
        given["queries"] = others[given["queries"]]
    with pytest.raises((ValueError, TypeError), match=message):
        influence(**given)


def test_heads_with_examples_of_their_own_are_refused():
    """Which example an influence is of would be open."""
    params, inputs = {"w": torch.ones(1, 2)}, {"a": torch.ones(3, 2), "b": torch.ones(2, 2)}

    def model(p, x):
        return {name: x[name] @ p["w"].mT for name in ("a", "b")}

    likelihood, targets = lrkfac.joint({"a": lrkfac.gaussian(), "b": lrkfac.gaussian()}), model(params, inputs)
    layers = lrkfac.find_layers(model, params, inputs)
    exact, at_targets = (lrkfac.evaluator(model, likelihood, layers, e) for e in ("exact", "empirical"))
    fisher = estimate(exact, params, [(inputs, targets)], layers, STRUCTURES["dense"])
    queries = at_targets(params, inputs, targets)
    with pytest.raises(ValueError, match=r"queries: expected one gradient .* whose heads have the same examples"):
        influence(fisher, queries, [queries], 0.1)
