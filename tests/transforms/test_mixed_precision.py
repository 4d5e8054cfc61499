"""``precondition_by_fisher(dtype=)``: what is held, reduced and applied in it, whatever the model's dtype is."""

from functools import cache

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.structures import dense, kronecker, low_rank, low_rank_plus_diagonal
from tests import reference
from tests.transforms.test_precondition import DENSE
from tests.transforms.test_travel import STRUCTURES

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
STRUCTURES = STRUCTURES | {
    "dense": DENSE,
    "reduce": kronecker(low_rank(2), dense(), treatment="reduce"),
    "corrected": kronecker(low_rank(2), low_rank_plus_diagonal(2), corrected=True),
    "exactly damped": kronecker(low_rank(2), low_rank(2), exact_damping=True),
}
each_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
HELD = [(BFLOAT16, None, FLOAT32), (BFLOAT16, FLOAT64, FLOAT64), (FLOAT64, None, FLOAT64), (FLOAT64, FLOAT32, FLOAT32)]


class Problem:
    """An embedding, a convolution, a scale, two equal linear layers and a last one."""

    def __init__(self, dtype, seed=0, width=8, thin=False):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: (torch.randn(*shape, generator=generator, dtype=FLOAT64) / 2).to(dtype)  # noqa: E731
        self.params = {"e": draw(5, width), "k": draw(2, 1, 3), "s": draw(width), "b": draw(width)}
        self.params |= {"l0": draw(width, width), "l1": draw(width, width), "out": draw(3, width)}
        self.inputs = torch.randint(5, (2,), generator=generator)
        self.targets = torch.randint(3, (2,), generator=generator)
        self.layers = lrkfac.find_layers(self.model, self.params, self.inputs)
        self.evaluate = lrkfac.evaluator(self.model, lrkfac.categorical(), self.layers, "empirical", thin=thin)

    @staticmethod
    def model(p, x):
        x = F.conv1d(F.embedding(x, p["e"])[:, None], p["k"], padding=1).mean(1) * p["s"]
        x = torch.tanh(F.linear(torch.tanh(F.linear(torch.tanh(x), p["l0"], p["b"])), p["l1"]))
        return F.linear(x, p["out"])

    def evaluation(self):
        return self.evaluate(self.params, self.inputs, self.targets)

    def run(self, tx, steps=2):
        state, e = tx.init(self.params), self.evaluation()
        for _ in range(steps):
            updates, state = tx.update(e.grads, state, self.params, evaluation=e)
        return updates, state


problem_of = cache(Problem)  # which nothing changes


def dtypes(tree):
    return {leaf.dtype for leaf in optree.tree_leaves(tree) if leaf.is_floating_point()}


@pytest.mark.parametrize("model_dtype, dtype, held", HELD, ids=str)
@each_structure
def test_states_have_the_chosen_dtype_and_updates_that_of_the_gradients(structure, model_dtype, dtype, held):
    problem = problem_of(model_dtype, thin=True, width=16)
    tx = precondition_by_fisher(problem.layers, structure, dtype=dtype)
    updates, state = problem.run(tx)
    assert dtypes(tx.init(problem.params)) == dtypes(state) == {held}
    assert dtypes(lrkfac.materialize(updates)) == {model_dtype}


@each_structure
def test_neither_scalars_of_another_dtype_nor_autocast_reach_the_linear_algebra(structure):
    problem = problem_of(FLOAT32)
    numbers = torch.tensor([0.03, 0.8], dtype=FLOAT64)
    tx = precondition_by_fisher(problem.layers, structure, damping=numbers[0], decay=numbers[1])
    e, start = problem.evaluation(), problem.run(tx)[1]
    for damping in (None, numbers[0], torch.tensor(0.03, dtype=BFLOAT16)):
        options = {"evaluation": e, **({} if damping is None else {"factor_damping": damping})}
        expected = tx.update(e.grads, start, problem.params, **options)
        with torch.autocast("cpu", dtype=BFLOAT16):
            found = tx.update(e.grads, start, problem.params, **options)
        assert dtypes(start) == dtypes(expected) == {FLOAT32}
        assert optree.tree_all(optree.tree_map(torch.equal, found, expected))


@settings(max_examples=8)
@given(st.sampled_from([BFLOAT16, FLOAT32]), st.integers(0, 2**20))
def test_statistics_are_reduced_in_the_chosen_dtype(dtype, seed):
    """Averages and updates of a model in few digits, to the digits of float64."""
    problem = Problem(dtype, seed)
    tx = precondition_by_fisher(problem.layers, DENSE, damping=0.1, dtype=FLOAT64)
    _, state = problem.run(tx, steps=1)
    e = problem.evaluation()
    wide = lrkfac.materialize(optree.tree_map(lambda g: g.double(), e.grads))
    updates, _ = tx.update(wide, state, problem.params, evaluation=e._replace(statistics=None))
    for layer in [layer for layer in problem.layers if layer.kind == "linear"]:
        (a,), (g,) = e.statistics.inputs[layer.name], e.statistics.output_gradients[layer.name]
        a, g = a.double(), g.double().flatten(0, 1)
        a = a if layer.bias is None else torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        A, B = a.mT @ a / len(a), e.statistics.scale.double() * g.mT @ g
        held = [factor.matrix for factor in state.factors[layer.name]]
        torch.testing.assert_close(held, [B, A], rtol=1e-12, atol=1e-14)
        weight = layer.weight.path
        if layer.bias is None:
            natural = reference.kronecker_preconditioned(wide[weight][None], A[None], B[None], 0.1)[0]
            torch.testing.assert_close(updates[weight], natural, rtol=1e-9, atol=1e-10)


@each_structure
def test_gradients_lose_nothing_to_a_narrower_inverse(structure):
    """What is applied is linear to the rounding of the gradients."""
    problem = problem_of(FLOAT64)
    tx = precondition_by_fisher(problem.layers, structure, dtype=FLOAT32)
    _, state = problem.run(tx)
    e = problem.evaluation()._replace(statistics=None)
    first, second = e.grads, optree.tree_map(torch.sin, problem.params)
    both = optree.tree_map(torch.add, first, second)
    u, v, w = (tx.update(g, state, problem.params, evaluation=e)[0] for g in (first, second, both))
    for name in u:
        torch.testing.assert_close(u[name] + v[name], w[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "model, chosen, other, words",
    [
        (FLOAT32, None, FLOAT64, r"layer 'e' in torch.float64, got torch.float32; pass what init"),
        (FLOAT32, FLOAT64, None, "in torch.float32, got torch.float64; .* or give the transformation that dtype="),
        (FLOAT64, FLOAT32, None, "in torch.float64, got torch.float32; .* or give the transformation that dtype="),
    ],
)
def test_a_state_in_another_dtype_is_refused(model, chosen, other, words):
    problem = problem_of(model)
    state, e = precondition_by_fisher(problem.layers, dtype=chosen).init(problem.params), problem.evaluation()
    with pytest.raises(ValueError, match=words):
        precondition_by_fisher(problem.layers, dtype=other).update(e.grads, state, problem.params, evaluation=e)


def test_accumulate_adds_in_float32():
    tx = lrkfac.accumulate(lrkfac.identity(), 256)
    state = tx.init({"w": torch.zeros(2, dtype=BFLOAT16)})
    for i in range(256):
        grads = {"w": torch.full((2,), 1.0 if i else 256.0, dtype=BFLOAT16)}
        updates, state = tx.update(grads, state)
    assert updates["w"].tolist() == [2.0, 2.0]  # 511 / 256, rounded
