"""Gradients held by their rows: the same step, chosen by a count of operations; the gradients themselves not formed."""

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import lrkfac
from lrkfac import LazyMatrix, materialize
from lrkfac.structures import kronecker
from tests.compiling import traced
from tests.dispatch import MatrixCount

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


def problem(model, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) / 3  # noqa: E731
    params = {"a": draw(D, D), "b": draw(D), "c": draw(D, D), "d": draw(4, D), "e": draw(4)}
    if model is transposed:
        params |= {"e0": draw(D)}
        params.pop("e")
    if model is convolved:
        params |= {"k": draw(2, 1, 3), "s": draw(D)}
    x = 3 * draw(N if model is not sequence else 4, D)
    n = 3 if model is sequence else N
    return params, x, torch.randint(4, (n,), generator=generator)


THIN = {linear: {"a", "c"}, transposed: {"a", "c"}, sequence: {"a", "c"}, tied: {"a"}, convolved: {"a", "c"}}
each_model = pytest.mark.parametrize("model", THIN, ids=lambda model: model.__name__)
OPTIONS = {"damping": 0.03, "decay": 0.8, "kl_clip": 1e-3}
CHAINS = {
    "low_rank_kfac": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=3, **OPTIONS),
    "weight decay": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=3, weight_decay=0.1, **OPTIONS),
    "schedule": lambda layers: lrkfac.low_rank_kfac(
        layers, lrkfac.schedules.exponential_decay(0.1, 1, 0.5), rank=3, **OPTIONS
    ),
    "no momentum": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=3, momentum=0.0, **OPTIONS),
    "kfac": lambda layers: lrkfac.kfac(layers, 0.1, **OPTIONS),
    "diagonal": lambda layers: lrkfac.precondition_by_fisher(
        layers, kronecker(lrkfac.structures.diagonal(), lrkfac.structures.low_rank_plus_diagonal(2))
    ),
    "layer_wise": lambda layers: lrkfac.precondition_by_fisher(layers, lrkfac.structures.unit_wise()),
    "decay before": lambda layers: lrkfac.chain(
        lrkfac.add_decayed_weights(0.1), lrkfac.precondition_by_fisher(layers, rank=3), lrkfac.scale(-0.1)
    ),
}
OTHERS = {
    "identity": lrkfac.identity(),
    "nesterov": lrkfac.trace(0.9, nesterov=True),
    "global norm": lrkfac.clip_by_global_norm(0.1),
    "value": lrkfac.clip(0.01),
    "adam": lrkfac.scale_by_adam(),
    "ema": lrkfac.ema_params(),
    "finite": lrkfac.apply_if_finite(lrkfac.trace(0.9), 2),
    "masked": lrkfac.masked(lrkfac.trace(0.9), lambda p: optree.tree_map(lambda x: x.ndim == 2, p)),
    "partition": lrkfac.partition(
        {True: lrkfac.trace(0.5), False: lrkfac.clip_by_kl(0.1, 1.0)},
        lambda p: optree.tree_map(lambda x: x.ndim == 2, p),
    ),
}
CHAINS |= {
    name: lambda layers, tx=tx: lrkfac.chain(lrkfac.precondition_by_fisher(layers, rank=3), tx)
    for name, tx in OTHERS.items()
}
CHAINS["adaptive"] = lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=3)


def stepper(model, make, thin, params, x, estimator="mc"):
    layers = lrkfac.find_layers(model, params, x)
    evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, thin=thin), make(layers)

    def step(params, state, x, y, noise, statistics):
        noise = noise if estimator == "mc" else None
        e = evaluate(params, x, y, statistics=statistics, noise=noise)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state, e.grads

    return step, tx.init


def compared(model, make, seed=0, rtol=1e-10, estimator="mc", after=lambda step: step):
    """A few steps by both routes, statistics at every other."""
    params, x, y = problem(model, seed)
    noise = torch.rand(1, len(y), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ways = [stepper(model, make, thin, params, x, estimator) for thin in (False, True)]
    states, reached = [init(params) for _, init in ways], [params, params]
    for statistics in (True, False, True, False):
        for i, (step, _) in enumerate(ways):
            run = after(step) if i else step
            reached[i], states[i], grads = run(reached[i], states[i], x, y, noise, statistics)
        held = {name for name, leaf in grads.items() if isinstance(leaf, LazyMatrix)}
        assert held == THIN[model]
        for a, b in zip(optree.tree_leaves(reached[1]), optree.tree_leaves(reached[0]), strict=True):
            assert (a - b).abs().max() <= rtol * b.abs().max()
    assert optree.tree_structure(states[0]) == optree.tree_structure(states[1])


@each_model
@pytest.mark.parametrize("make", [CHAINS[name] for name in ("low_rank_kfac", "kfac")], ids=["low rank", "dense"])
def test_both_routes_agree(model, make):
    compared(model, make)


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS.keys())
def test_every_transformation_takes_it(make):
    compared(linear, make)


@given(seed=st.integers(0, 2**16), rank=st.integers(1, 8), estimator=st.sampled_from(["exact", "empirical", "mc"]))
def test_both_routes_agree_everywhere(seed, rank, estimator):
    make = lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=rank, weight_decay=0.01, **OPTIONS)  # noqa: E731
    compared(linear, make, seed, estimator=estimator)


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


@pytest.mark.parametrize("n, held", [(12, True), (13, False)])
def test_both_sides_of_the_threshold(n, held):
    """Width 48, no bias: rows hold half of the numbers of the weight where there are 12 of them."""
    params = {"w": torch.randn(48, 48).double()}
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    x, y = torch.randn(n, 48).double(), torch.randint(48, (n,))
    layers = lrkfac.find_layers(model, params, x)
    grads = [
        lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=thin)(params, x, y, statistics=False).grads
        for thin in (False, True)
    ]
    assert isinstance(grads[1]["w"], LazyMatrix) == held
    torch.testing.assert_close(materialize(grads[1]), grads[0], rtol=1e-12, atol=1e-14)


def test_other_products_take_gradients_that_are_not_formed():
    params, x, y = problem(linear)
    layers = lrkfac.find_layers(linear, params, x)
    e = lrkfac.evaluator(linear, lrkfac.categorical(), layers, thin=True)(params, x, y, statistics=False)
    matrices = materialize(e.grads)
    assert torch.equal(e.quadratic(e.grads, e.grads), e.quadratic(matrices, matrices))
    assert all(map(torch.equal, e.product(e.grads).values(), e.product(matrices).values()))


def test_statistics_of_some_examples():
    params, x, y = problem(linear)
    layers = lrkfac.find_layers(linear, params, x)
    e = lrkfac.evaluator(linear, lrkfac.categorical(), layers, thin=True)(params, x, y, examples=torch.tensor([0, 2]))
    whole = lrkfac.evaluator(linear, lrkfac.categorical(), layers)(params, x, y, statistics=False)
    torch.testing.assert_close(materialize(e.grads), whole.grads)


def test_half_precision():
    """Both routes round to bfloat16, at different places."""
    params, x, y = problem(linear, dtype=torch.bfloat16)
    make = CHAINS["weight decay"]
    found = []
    for thin in (False, True):
        step, init = stepper(linear, make, thin, params, x, "empirical")
        reached, state = params, init(params)
        for statistics in (True, False):
            reached, state, _ = step(reached, state, x, y, None, statistics)
        found.append(reached)
    for a, b in zip(*map(optree.tree_leaves, found), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_ensembles():
    params, x, y = problem(linear)
    step, init = stepper(linear, CHAINS["weight decay"], True, params, x)
    noise = torch.rand(1, N, 4).double()
    both = optree.tree_map(lambda p: torch.stack([p, 1.1 * p]), params)
    for statistics in (True, False):
        run = lambda p, statistics=statistics: step(p, init(p), x, y, noise, statistics)[0]  # noqa: E731
        found = vmap(run)(both)
        for i in range(2):
            alone = run(optree.tree_map(lambda p, i=i: p[i], both))
            for name, p in alone.items():
                torch.testing.assert_close(found[name][i], p, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_compiled_equals_eager():
    torch.compiler.reset()

    def after(step):
        def forms(*args):
            params, state, grads = step(*args)
            return params, state, optree.tree_map(lambda g: g.dense() if isinstance(g, LazyMatrix) else g, grads)

        compiled = traced(forms)

        def run(*args):
            params, state, grads = compiled(*args)
            _, _, held = step(*args)
            torch.testing.assert_close(grads, materialize(held))
            return params, state, held

        return run

    compared(linear, CHAINS["weight decay"], after=after)


@pytest.mark.parametrize("thin", [True, False])
def test_no_matrix_but_those_of_the_parameters(thin):
    """At width 2048: momentum and the new parameters alone, and thin blocks; else at most nine passes over a gradient.

    The largest other tensor has the factors' rank and oversampling as its columns, or the batch.
    """
    width, n, rank = 2048, 8, 32
    params = {"a": torch.zeros(width, width), "b": torch.zeros(width, width), "c": torch.zeros(10, width)}
    model = lambda p, x: F.linear(F.linear(F.linear(x, p["a"]), p["b"]), p["c"])  # noqa: E731
    x, y = torch.randn(n, width), torch.randint(10, (n,))
    layers = lrkfac.find_layers(model, params, x)
    step, init = stepper(model, lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=rank), thin, params, x)
    noise = torch.rand(1, n, 10)
    _, state, _ = step(params, init(params), x, y, noise, True)
    for statistics in (True, False):
        with MatrixCount(width**2 // 2) as count:
            step(params, state, x, y, noise, statistics)
        assert count.made <= 2 * (2 if thin else 9)
        assert count.numel <= width * (2 * rank + 16)
    assert len(layers) == 3


def test_only_a_yes_or_no_is_taken():
    params, x, _ = problem(linear)
    with pytest.raises(TypeError, match="thin: expected True or False, got 1"):
        lrkfac.evaluator(linear, lrkfac.categorical(), lrkfac.find_layers(linear, params, x), thin=1)


def test_what_is_not_held_by_rows_is_scaled_and_formed_at_the_end():
    """Three matrices less: what is clipped, what momentum hands out, and what is added to the parameters."""
    params = {"w": torch.randn(64, 64)}
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    x, y = torch.randn(64, 64), torch.randint(64, (64,))
    layers = lrkfac.find_layers(model, params, x)
    made = []
    for thin in (True, False):
        evaluate, tx = (
            lrkfac.evaluator(model, lrkfac.categorical(), layers, thin=thin),
            lrkfac.low_rank_kfac(layers, 0.1),
        )
        state = tx.init(params)
        e = evaluate(params, x, y, statistics=False)
        assert isinstance(e.grads["w"], torch.Tensor) and e.thin == thin
        with MatrixCount(64**2) as count:
            updates, _ = tx.update(e.grads, state, params, evaluation=e)
            new = lrkfac.apply_updates(params, updates)
        assert isinstance(updates["w"], LazyMatrix) == thin
        made.append((count.made, new))
    assert made[0][0] == made[1][0] - 3
    torch.testing.assert_close(made[0][1], made[1][1])
