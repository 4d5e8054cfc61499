"""Gradients held by their rows: the same step, chosen by a count of operations; the gradients themselves not formed."""

from functools import cache, partial

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import LazyMatrix, materialize
from tests import cases
from tests.described import layers_of
from tests.dispatch import LargestTensor
from tests.test_training_step import close, stepper, trained
from tests.transforms.test_precondition import cast
from tests.transforms.test_travel import ELEMENTWISE, of_layers

N, D = 5, 24


def linear(p, x):
    x = torch.tanh(F.linear(x, p["a"], p["b"]))
    return F.linear(torch.tanh(F.linear(x, p["c"])), p["d"], p["e"])


def transposed(p, x):
    return torch.tanh(torch.tanh(x @ p["a"].T + p["b"]) @ p["c"] + p["e0"]) @ p["d"].t()


def sequence(p, x):
    x = x.reshape(-1, 2, D)[:2]
    return linear(p, torch.cat([x, x[:1]])).mean(1)


def tied(p, x):
    """The second weight is used twice, and is formed."""
    x = torch.tanh(F.linear(x, p["a"], p["b"]))
    return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, p["c"])), p["c"])), p["d"], p["e"])


def convolved(p, x):
    x = torch.tanh(F.conv1d(x[:, None], p["k"], padding=1)).mean(1) * p["s"]
    return linear(p, x)


@cache  # which nothing changes
def problem(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) / 3  # noqa: E731
    params = {"a": draw(D, D), "b": draw(D), "c": draw(D, D), "d": draw(4, D), "e": draw(4)}
    if model is transposed:
        params |= {"e0": draw(D)}
        params.pop("e")
    if model is convolved:
        params |= {"k": draw(2, 1, 3), "s": draw(D)}
    x = 3 * draw(N if model is not sequence else 4, D)
    y = torch.randint(4, (len(model(params, x)),), generator=generator)
    return cases.Case(model.__name__, model, params, x, y, "categorical", {}, ())


def evaluation(case, thin=True, **options):
    evaluate = lrkfac.evaluator(case.model, lrkfac.categorical(), layers_of(case), thin=thin)
    return evaluate(case.params, case.inputs, case.targets, **options)


THIN = {linear: {"a", "c"}, transposed: {"a", "c"}, sequence: {"a", "c"}, tied: {"a"}, convolved: {"a", "c"}}
OPTIONS = {"damping": 0.03, "decay": 0.8, "kl_clip": 1e-3}


def compared(case, make, estimator="mc", rtol=1e-10):
    """A few steps by both routes, statistics at every other."""
    grads = evaluation(case).grads
    assert {name for name, leaf in grads.items() if isinstance(leaf, LazyMatrix)} == THIN[case.model]
    (found, _, state), (expected, _, other) = (trained(case, make, estimator, 3, 2, thin) for thin in (True, False))
    assert optree.tree_structure(state) == optree.tree_structure(other)
    for params, others in zip(found, expected, strict=True):
        close(params, others, rtol)
        assert {p.dtype for p in params.values()} == {case.inputs.dtype}


@pytest.mark.parametrize("model", THIN, ids=lambda model: model.__name__)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    rank=st.none() | st.integers(1, 8),
    estimator=st.sampled_from(["exact", "empirical", "mc"]),
    decay=st.sampled_from([0.0, 0.01]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_both_routes_agree(model, seed, rank, estimator, decay, momentum):
    make = lrkfac.kfac if rank is None else partial(lrkfac.low_rank_kfac, rank=rank)
    make = partial(make, learning_rate=0.1, weight_decay=decay, momentum=momentum, **OPTIONS)
    compared(problem(model, seed), make, estimator)


LAYERS = layers_of(problem(linear))
PRECONDITION = lrkfac.precondition_by_fisher(LAYERS, rank=3)
DECAYS = {name: 0.1 * i for i, name in enumerate("abcde")}
CHAINS = {
    **of_layers(LAYERS),
    "trees": lrkfac.low_rank_kfac(
        LAYERS, {n: 0.1 + d for n, d in DECAYS.items()}, 2, momentum=DECAYS, weight_decay=DECAYS
    ),
    **{
        name: lrkfac.chain(PRECONDITION, tx, lrkfac.scale(-0.1))
        for name, tx in ELEMENTWISE.items()
        if name != "accumulate"
    },
    "decay before": lrkfac.chain(lrkfac.add_decayed_weights(0.1), PRECONDITION, lrkfac.scale(-0.1)),
}


@pytest.mark.parametrize("tx", CHAINS.values(), ids=CHAINS.keys())
def test_every_transformation_takes_it(tx):
    compared(problem(linear), lambda layers: tx)


@pytest.mark.parametrize("model", [linear, transposed], ids=lambda model: model.__name__)
@pytest.mark.parametrize("scaled", ["acd", "be", "abcde"])
def test_gradients_may_be_scaled_before(model, scaled):
    """Weights, biases, or both: a bias is not always the sum of its weight's rows."""
    before = lrkfac.masked(lrkfac.scale(0.3), lambda p: {name: name[0] in scaled for name in p})
    compared(problem(model), lambda layers: lrkfac.chain(before, lrkfac.precondition_by_fisher(layers, rank=3)))


def test_half_precision():
    """Both routes round to bfloat16, at different places."""
    make = partial(lrkfac.low_rank_kfac, learning_rate=0.1, rank=3, weight_decay=0.1, **OPTIONS)
    compared(cast(problem(linear), torch.bfloat16), make, "empirical", 0.05)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.booleans())
def test_the_choice_is_the_count_of_operations(n, d_in, d_out, positions, bias):
    params = {"w": torch.ones(d_out, d_in), **({"b": torch.ones(d_out)} if bias else {})}
    model = lambda p, x: F.linear(x, p["w"], p.get("b"))  # noqa: E731
    x = torch.ones(n, positions, d_in)
    y = torch.zeros(n, positions, dtype=torch.int64)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), lrkfac.find_layers(model, params, x), thin=True)
    rows, columns = n * positions, d_in + bias
    for statistics in (True, False):
        leaf = evaluate(params, x, y, statistics=statistics).grads["w"]
        assert isinstance(leaf, LazyMatrix) == (2 * rows * (d_out + columns) <= d_out * columns)


def test_other_products_take_gradients_that_are_not_formed_and_some_examples_give_statistics():
    case = problem(linear)
    e = evaluation(case, examples=torch.tensor([0, 2]))
    matrices = materialize(e.grads)
    torch.testing.assert_close(matrices, evaluation(case, thin=False).grads)
    assert torch.equal(e.quadratic(e.grads, e.grads), e.quadratic(matrices, matrices))
    assert all(map(torch.equal, e.product(e.grads).values(), e.product(matrices).values()))


@pytest.mark.parametrize("thin", [True, False])
def test_no_matrix_but_those_of_the_parameters(thin):
    """Momentum and the new parameters alone, and thin blocks; else at most nine passes over a gradient.

    The largest other tensor has the factors' rank and oversampling as its columns, or the batch.
    """
    width, n, rank = 512, 8, 16
    params = {"a": torch.zeros(width, width), "b": torch.zeros(width, width), "c": torch.zeros(10, width)}
    model = lambda p, x: F.linear(F.linear(F.linear(x, p["a"]), p["b"]), p["c"])  # noqa: E731
    x, y = torch.randn(n, width), torch.randint(10, (n,))
    case = cases.Case("wide", model, params, x, y, "categorical", {}, ())
    step, init = stepper(case, partial(lrkfac.low_rank_kfac, learning_rate=0.1, rank=rank), thin=thin)
    noise = torch.rand(1, n, 10)
    _, state, _ = step(params, init(params), x, y, noise, True)
    for statistics in (True, False):
        with LargestTensor(width**2 // 2) as count:
            step(params, state, x, y, noise, statistics)
        assert count.made <= 2 * (2 if thin else 9)
        assert count.numel <= width * (2 * rank + 16)


def test_what_is_not_held_by_rows_is_scaled_and_formed_at_the_end():
    """Three matrices less: what is clipped, what momentum hands out, and what is added to the parameters."""
    params = {"w": torch.randn(64, 64)}
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    x, y = torch.randn(64, 64), torch.randint(64, (64,))
    case = cases.Case("square", model, params, x, y, "categorical", {}, ())
    tx, made = lrkfac.low_rank_kfac(layers_of(case), 0.1), []
    for thin in (True, False):
        state, e = tx.init(params), evaluation(case, thin, statistics=False)
        assert isinstance(e.grads["w"], torch.Tensor) and e.thin == thin
        with LargestTensor(64**2) as count:
            updates, _ = tx.update(e.grads, state, params, evaluation=e)
            new = lrkfac.apply_updates(params, updates)
        assert isinstance(updates["w"], LazyMatrix) == thin
        made.append((count.made, new))
    assert made[0][0] == made[1][0] - 3
    torch.testing.assert_close(made[0][1], made[1][1])
