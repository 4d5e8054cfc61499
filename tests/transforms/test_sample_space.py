"""``precondition_in_sample_space`` equals the damped dense Fisher matrix of the batch, whatever the layers."""

import optree
import pytest
import torch
from torch import nn

import lrkfac
from lrkfac import precondition_in_sample_space
from lrkfac.testing import check_transformation
from tests import cases, reference_networks
from tests.compiling import traced
from tests.tensors import normal
from tests.transforms.test_base import close
from tests.transforms.test_precondition import layers_and_evaluate

COVERED = [case for case in cases.ALL if case.name != "uncovered_shift"]
MLP, SHIFT = cases.LINEAR[0], cases.LINEAR[6]


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def like(params, vector):
    leaves, structure = optree.tree_flatten(params)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return optree.tree_unflatten(structure, [x.reshape(leaf.shape) for x, leaf in zip(parts, leaves, strict=True)])


def fisher(evaluation, params):
    """The batch's matrix by forward derivatives, column by column."""
    columns = torch.eye(len(flat(params)), dtype=torch.float64)
    return torch.stack([flat(evaluation.product(like(params, column))) for column in columns])


def damped_solution(F, damping, b):
    return torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), b)


@pytest.mark.parametrize("damping", [0.1, 1e-6])
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.name)
def test_equals_the_dense_reference(case, damping):
    layers, evaluate = layers_and_evaluate(case)
    e, tx = evaluate(case.params), precondition_in_sample_space(layers, damping)
    updates, _ = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    F = reference_networks.gauss_newton_matrix(case)
    expected = damped_solution(F, damping, reference_networks.flatten(reference_networks.gradients(case)))
    close(reference_networks.flatten(updates), expected, 1e-7, 1e-9 * float(expected.norm()))


class Heads(nn.Module):
    """Two heads; an embedding, a scale and a shift, and a weight used twice."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.twice, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        h = self.twice(torch.tanh(self.twice(self.norm(self.words(x))))).tanh()
        return {"one": self.one(h.mean(1)), "two": self.two(h[:, 0])}


def of_heads():
    torch.manual_seed(0)
    model, params = lrkfac.from_module(Heads().double())
    x, y = torch.randint(7, (5, 3)), {"one": normal(5, 2), "two": torch.tensor([0, 1, 2, 2, 0])}
    smoothed = lrkfac.categorical(ignore_index=1, class_weights=[1.0, 2.0, 3.0], label_smoothing=0.2)
    heads = {"one": lrkfac.gaussian(torch.tensor([0.5, 2.0])), "two": smoothed}
    likelihood = lrkfac.joint(heads, {"one": 0.3, "two": 2.0})
    return model, params, x, y, likelihood


def of_family(likelihood, y):
    torch.manual_seed(0)
    model, params = lrkfac.from_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    return model, params, normal(6, 3), y, likelihood


PROBLEMS = {
    "heads": of_heads(),
    "poisson": of_family(lrkfac.poisson(), normal(6, 2).abs()),
    "classes along axis 1": of_family(lrkfac.categorical(1), torch.tensor([0, 1, 1, 0, 1, 0])),
}


def prepared(name):
    model, params, x, y, likelihood = PROBLEMS[name]
    layers = lrkfac.find_layers(model, params, x)
    f = lrkfac.evaluator(model, likelihood, layers, "exact")
    return layers, params, lambda p: f(p, x, y)


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_products_with_the_fisher_matrix(name):
    layers, params, evaluate = prepared(name)
    e = evaluate(params)
    F, g = fisher(e, params), flat(e.grads)
    for damping in (0.1, 1e-5):
        tx = precondition_in_sample_space(layers, damping)
        close(flat(tx.update(e.grads, tx.init(params), params, evaluation=e)[0]), damped_solution(F, damping, g), 1e-8)


def test_a_gradient_of_something_else_is_preconditioned_as_well():
    layers, params, evaluate = prepared("heads")
    e, tx = evaluate(params), precondition_in_sample_space(layers, 0.2)
    v, F = normal(len(flat(params)), seed=3), fisher(e, params)
    for other in (v, flat(e.grads) * -3, flat(e.grads) + 0.1 * v, 0 * v):
        updates, _ = tx.update(like(params, other), tx.init(params), params, evaluation=e)
        close(flat(updates), damped_solution(F, 0.2, other), 1e-10, 1e-12)


def test_momentum_stays_where_the_batch_says_nothing():
    """SPRING's recursion: the direction minimises the linearised loss plus ½ λ ‖φ - μ φ₀‖²."""
    layers, params, evaluate = prepared("heads")
    e, tx = evaluate(params), precondition_in_sample_space(layers, 0.2, momentum=0.9)
    F, g, state = fisher(e, params), flat(e.grads), tx.init(params)
    direction = torch.zeros_like(g)
    for _ in range(3):
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        direction = damped_solution(F, 0.2, g + 0.2 * 0.9 * direction)
        close(flat(updates), direction, 1e-10)
    plain, with_zero = (precondition_in_sample_space(layers, 0.2, m) for m in (0.0, torch.tensor(0.0)))
    updates = [tx.update(e.grads, tx.init(params), params, evaluation=e)[0] for tx in (plain, with_zero)]
    close(*updates)


def test_equals_the_full_structure():
    layers, evaluate = layers_and_evaluate(MLP)
    e = evaluate(MLP.params)
    txs = (
        precondition_in_sample_space(layers, 1e-3),
        lrkfac.precondition_by_fisher(layers, lrkfac.structures.full(), damping=1e-3, decay=0.0),
    )
    close(*[tx.update(e.grads, tx.init(MLP.params), MLP.params, evaluation=e)[0] for tx in txs], 1e-9)


def test_micro_batches_and_half_precision():
    model, params, x, y, likelihood = PROBLEMS["poisson"]
    layers, params, evaluate = prepared("poisson")
    f = lrkfac.evaluator(model, likelihood, layers, "exact")
    merged = lrkfac.merge_evaluations([f(params, x[:2], y[:2]), f(params, x[2:], y[2:])])
    tx = precondition_in_sample_space(layers, 1e-2)
    whole, parts = (tx.update(e.grads, tx.init(params), evaluation=e)[0] for e in (evaluate(params), merged))
    close(whole, parts, 1e-10)
    halves, xs = {name: p.to(torch.bfloat16) for name, p in params.items()}, x.to(torch.bfloat16)
    e = f(halves, xs, y)
    for dtype in (None, torch.float64):
        tx = precondition_in_sample_space(layers, 1e-1, 0.5, dtype=dtype)
        updates, state = tx.update(e.grads, tx.init(halves), evaluation=e)
        assert {u.dtype for u in updates.values()} == {torch.bfloat16}
        assert {u.dtype for u in state.direction} == {torch.float32}
        tx = precondition_in_sample_space(layers, 1e-1)
        expected = tx.update(evaluate(params).grads, tx.init(params), evaluation=evaluate(params))[0]
        torch.testing.assert_close(flat(updates).double(), flat(expected), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("make", [lambda tx: tx, lrkfac.scale_by_quadratic_model], ids=["alone", "quadratic model"])
def test_laws(make):
    layers, params, evaluate = prepared("poisson")

    def evaluated(p):
        e = evaluate(p)
        return e.grads, {"evaluation": e}

    check_transformation(make(precondition_in_sample_space(layers, 1e-2, 0.5)), params, evaluated)


def test_solves_a_least_squares_problem_in_one_step_at_a_damping_of_nothing():
    """With the quadratic model; by the gradient alone, a difference over ``λ`` would be rounding."""
    linear = lambda p, x: x @ p["w"].T  # noqa: E731
    x, y, params = normal(6, 20), normal(6, 2, seed=1), {"w": normal(2, 20, seed=2)}
    layers = lrkfac.find_layers(linear, params, x)
    evaluate = lrkfac.evaluator(linear, lrkfac.gaussian(), layers, "exact")
    tx = precondition_in_sample_space(layers, 1e-13)
    e = evaluate(params, x, y)
    params = optree.tree_map(torch.sub, params, tx.update(e.grads, tx.init(params), evaluation=e)[0])
    assert e.loss_at(params) < 1e-20 * e.loss
    tx = lrkfac.scale_by_quadratic_model(precondition_in_sample_space(layers), damping=1e-10)
    params = {"w": normal(2, 20, seed=2)}
    state = tx.init(params)
    for _ in range(4):
        e = evaluate(params, x, y)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
    assert e.loss_at(params) < 1e-12


@pytest.mark.slow
def test_compiled_equals_eager():
    torch.compiler.reset()
    layers, params, evaluate = prepared("poisson")
    tx = precondition_in_sample_space(layers, 1e-2, 0.5)

    def step(params, state):
        e = evaluate(params)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    close(traced(step)(params, state), step(params, state), rtol=1e-8, atol=1e-10)


def test_refusals(monkeypatch):
    layers, params, evaluate = prepared("poisson")
    model, _, x, y, likelihood = PROBLEMS["poisson"]
    tx = precondition_in_sample_space(layers)
    state = tx.init(params)
    f, mc = (lrkfac.evaluator(model, likelihood, layers, estimator) for estimator in ("exact", "mc"))
    without = lrkfac.evaluator(model, lrkfac.Likelihood("mine", *[lambda f, y: f] * 3), layers, "exact")
    name = layers.layers[0].name
    for e, message in (
        (f(params, x, y, statistics=False), "got none; call evaluate"),
        (f(params, x, y, layers=(name,)), f"got none of .*{layers.layers[1].name}"),
        (f(params, x, y, examples=torch.arange(3)), "without examples="),
        (mc(params, x, y), 'estimator="exact"'),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(e.grads, state, params, evaluation=e)
    assert without.objective.heads.residuals([x], [y], [1.0]) == ()
    with pytest.raises(ValueError, match="expected a direction of the shapes"):
        precondition_in_sample_space(layers, momentum=0.5).update(e.grads, state, evaluation=evaluate(params))
    mixing = lambda p, x: x @ p["w"].T - (x @ p["w"].T).mean(0)  # noqa: E731
    with pytest.raises(ValueError, match="outputs of one example depend on no other"):
        precondition_in_sample_space(lrkfac.find_layers(mixing, {"w": normal(2, 3)}, normal(5, 3)))
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"kernel of 12 outputs .* take 3,456 bytes, more than the 100 of cpu"):
        tx.update(e.grads, state, params, evaluation=evaluate(params))
