"""Where the examples are: any arrangement of rows gives the step of the model written plainly, or is refused."""

import os

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac.structures import dense, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal
from lrkfac.testing.twins import twins

DOUBLE = torch.float64
DENSE = {
    "expand": kronecker(dense(), dense()),
    "reduce": kronecker(dense(), dense(), treatment="reduce"),
    "corrected": kronecker(dense(), dense(), corrected=True),
    "low rank": kronecker(low_rank(2), low_rank_plus_diagonal(2)),
    "layer": layer_wise(),
    "full": full(),
}


def step(model, params, inputs, targets, structure, estimator="exact", likelihood=None, **options):
    likelihood = lrkfac.categorical() if likelihood is None else likelihood
    layers = lrkfac.find_layers(model, params, inputs, **options)
    noise = None
    if estimator == "mc":
        shape = model(params, inputs).shape
        noise = torch.rand(1, *shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    evaluation = lrkfac.evaluator(model, likelihood, layers, estimator)(params, inputs, targets, noise=noise)
    tx = lrkfac.precondition_by_fisher(layers, structure, damping=0.1)
    return tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[0], layers


def steps(model, params, inputs, targets):
    """The updates by each structure, of one evaluation."""
    layers = lrkfac.find_layers(model, params, inputs)
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, inputs, targets)
    made = {name: lrkfac.precondition_by_fisher(layers, structure, damping=0.1) for name, structure in DENSE.items()}
    return {name: tx.update(e.grads, tx.init(params), params, evaluation=e)[0] for name, tx in made.items()}


drawn = given(twins(), st.sampled_from(sorted(DENSE)), st.sampled_from(["exact", "mc", "empirical"]))


@settings(max_examples=10)
@drawn
def test_any_arrangement_of_rows_gives_the_step_of_the_plain_twin(pair, structure, estimator):
    gives_the_step_of_the_twin(pair, structure, estimator)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("LRKFAC_TWINS", "120")))
@drawn
def test_many_arrangements(pair, structure, estimator):
    gives_the_step_of_the_twin(pair, structure, estimator)


def gives_the_step_of_the_twin(pair, structure, estimator):
    batch = (pair.params, pair.inputs, pair.targets)
    expected, _ = step(pair.twin, *batch, DENSE[structure], estimator)
    result, layers = step(pair.model, *batch, DENSE[structure], estimator)  # none of these is refused
    assert not layers.uncovered and layers.independent and layers.single, (pair.name, str(layers))
    for key, x in expected.items():
        torch.testing.assert_close(result[key], x, rtol=1e-8, atol=1e-9, msg=f"{pair.name}, {structure}: {key}")


GENERATOR = torch.Generator().manual_seed(0)
PAIRS = {
    "w": torch.randn(3, 4, dtype=DOUBLE, generator=GENERATOR),
    "o": torch.randn(2, 3, dtype=DOUBLE, generator=GENERATOR),
}


def together(p, pair):
    u, v = (torch.cat(pair) @ p["w"].T).tanh().chunk(2)
    return (u * v) @ p["o"].T


def interleaved(p, pair):
    h = (torch.stack(pair, 1).flatten(0, 1) @ p["w"].T).tanh()
    return (h[::2] * h[1::2]) @ p["o"].T


def one_by_one(p, pair):
    u, v = [(z @ p["w"].T).tanh() for z in pair]
    return (u * v) @ p["o"].T


@pytest.mark.parametrize("model", [together, interleaved])
def test_pairs_in_one_call_are_two_calls(model):
    pair, targets = (torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)), torch.randint(2, (5,))
    optree.tree_map(torch.testing.assert_close, *[steps(one, PAIRS, pair, targets) for one in (model, one_by_one)])


def rolled(p, x):
    return (torch.cat([x, x.roll(1, 0)]) @ p["w"].T).tanh().chunk(2)[1].roll(-1, 0) @ p["o"].T


def test_rows_that_are_moved_on_are_not_in_the_order_of_examples():
    layers = lrkfac.find_layers(rolled, PAIRS, torch.randn(5, 4, dtype=DOUBLE))
    assert not layers["w"].by_example and layers["o"].by_example


SCALED = {
    "largest of all": lambda h: h / h.abs().amax(),
    "largest of each": lambda h: h / h.abs().amax(0),
    "threshold": lambda h: h * (h > 0.5 * h.amax()),
    "rounded": lambda h: (h / h.abs().amax() * 8).round() + h,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scaled", SCALED.values(), ids=SCALED.keys())
def test_dependence_through_few_examples_is_seen(scaled, seed):
    torch.manual_seed(seed)
    model = lambda p, x: scaled(x @ p["w"].T).tanh() @ p["o"].T  # noqa: E731
    assert lrkfac.find_layers(model, PAIRS, torch.randn(16, 4, dtype=DOUBLE)).independent is False


def test_the_axis_along_which_examples_are_independent_is_the_batch():
    model = lambda p, x: (x @ p["w"].T).tanh().mean(0) @ p["o"].T  # noqa: E731
    layers = lrkfac.find_layers(model, PAIRS, torch.randn(6, 5, 4, dtype=DOUBLE))
    assert dict(layers.batch_axes) == {"": 1} and layers.independent and layers["w"].by_example


def test_both_towers_hold_examples():
    towers = lambda p, ab: (ab[0] @ p["w"].T) @ (ab[1] @ p["w"].T).T  # noqa: E731
    pair = (torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE))
    layers = lrkfac.find_layers(towers, {"w": PAIRS["w"]}, pair)
    assert dict(layers.batch_axes) == {"0": 0, "1": 0} and layers.independent is False and not layers.uncovered


def test_one_example_without_an_axis_is_no_layer():
    x, y = torch.randn(4, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    params = {"w": PAIRS["w"]}
    with pytest.warns(UserWarning, match="no layer found"):
        layers = lrkfac.find_layers(lambda p, x: p["w"] @ x, params, x)
    model = lambda p, x: F.linear(x, p["w"])  # noqa: E731
    with pytest.warns(UserWarning, match="no layer found"):
        layers = lrkfac.find_layers(model, params, x)
    evaluation = lrkfac.evaluator(model, lrkfac.gaussian(), layers)(params, x, y)
    torch.testing.assert_close(evaluation.grads["w"], torch.outer(model(params, x) - y, x) / 3)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_a_row_that_all_examples_share_is_one_of_each(n):
    """A learned query through a layer, where the numbers of examples and features may be equal."""
    params = {"w": torch.randn(4, 5, dtype=DOUBLE), "o": torch.randn(2, 4, dtype=DOUBLE)}
    query, x = torch.randn(1, 5, dtype=DOUBLE), torch.randn(n, 4, dtype=DOUBLE)
    shared = lambda p, x: ((query @ p["w"].T) * x) @ p["o"].T  # noqa: E731
    plain = lambda p, x: ((query.expand(len(x), 5) @ p["w"].T) * x) @ p["o"].T  # noqa: E731
    batch = (params, x, torch.randint(2, (n,)))
    optree.tree_map(torch.testing.assert_close, *[steps(one, *batch) for one in (shared, plain)])


def convolved(p, frames):
    return F.linear(torch.tanh(F.conv2d(frames, p["w"])).mean((2, 3)), p["o"])


def embedded(p, numbers):
    return F.linear(F.embedding(numbers, p["w"]).tanh(), p["o"])


@pytest.mark.parametrize("model", [convolved, embedded])
def test_frames_and_tokens_folded_into_the_batch(model):
    """Before or behind the examples, as one position after another."""
    shape = (3, 2, 3, 3) if model is convolved else (6, 3)
    params = {"w": torch.randn(shape, dtype=DOUBLE), "o": torch.randn(2, 3, dtype=DOUBLE)}
    x = torch.randn(5, 4, 2, 5, 5, dtype=DOUBLE) if model is convolved else torch.randint(6, (5, 4))
    each = lambda p, x: torch.stack([model(p, one) for one in x.unbind(1)]).mean(0)  # noqa: E731
    batch_first = lambda p, x: model(p, x.flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1)  # noqa: E731
    time_first = lambda p, x: model(p, x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).mean(0)  # noqa: E731
    expected, *found = (steps(one, params, x, torch.arange(5) % 2) for one in (each, batch_first, time_first))
    for updates in found:
        optree.tree_map(torch.testing.assert_close, updates, expected)


def test_a_vector_as_long_as_the_batch_need_not_hold_examples():
    params, x, w = {"w": torch.randn(2, 4)}, torch.randn(5, 4), torch.rand(5)
    mean = lambda p, xw: (xw[0] * xw[1].mean()) @ p["w"].T  # noqa: E731
    each = lambda p, xw: (xw[0] * xw[1][:, None]) @ p["w"].T  # noqa: E731
    features = lambda p, xw: (xw[0] * xw[1][:4]) @ p["w"].T  # noqa: E731
    axes = [lrkfac.find_layers(m, params, (x, w)).batch_axes for m in (mean, each, features)]
    assert [dict(a) for a in axes] == [{"0": 0}, {"0": 0, "1": 0}, {"0": 0}]
    layers = lrkfac.find_layers(mean, params, (x, w))
    numbers = torch.tensor([1, 3])
    some = lrkfac.evaluator(mean, lrkfac.gaussian(), layers)(params, (x, w), torch.randn(5, 2), examples=numbers)
    torch.testing.assert_close(some.statistics.inputs["w"][0], x[numbers] * w.mean())


def test_the_user_says_where_the_batch_is():
    """Examples that are all alike show nothing."""
    params, x = {"w": torch.randn(2, 4)}, torch.zeros(3, 3, 4)
    model = lambda p, x: (x.sum(1) + x.sum(0).mean()) @ p["w"].T  # noqa: E731
    assert lrkfac.find_layers(model, params, x, batch_axes=0).batch_axes == (("", 0),)
    pair = {"x": x, "mask": torch.ones(3, 3), "scale": 2.0}
    of_pair = lambda p, b: (b["x"].sum(1) * b["scale"]) @ p["w"].T  # noqa: E731
    layers = lrkfac.find_layers(of_pair, params, pair, batch_axes={"x": 0, "mask": None, "scale": None})
    assert layers.batch_axes == (("x", 0),) and layers["w"].by_example
    for axes, words in [(7, "axis 7"), ({"x": 0}, "prefix"), ({"x": 0, "mask": "a", "scale": None}, "integers")]:
        with pytest.raises((ValueError, TypeError), match=f"batch_axes: .*{words}"):
            lrkfac.find_layers(of_pair, params, pair, batch_axes=axes)


def batch_normalised(p, x):
    h = F.linear(x, p["w"])
    return F.linear(torch.tanh((h - h.mean(0)) / h.std(0)), p["o"])


NEIGHBOURS = (torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.5).double()


def graph(p, x):
    """All nodes of one graph as examples."""
    return NEIGHBOURS @ F.linear(torch.tanh(NEIGHBOURS @ F.linear(x, p["w"])), p["o"])


def contrastive(p, x):
    h = F.linear(x, p["w"])
    return h @ h.mT


def flattened(p, x):
    return F.linear(torch.tanh(F.linear(x, p["w"])), p["o"]).flatten(0, 1)


def in_sequence(p, x):
    """What ``flattened`` computes, with causal dependence between positions."""
    h = torch.tanh(F.linear(x, p["w"])).cumsum(1)
    return F.linear(h, p["o"]).flatten(0, 1)


INTERACTING = {
    "normalised": (batch_normalised, (6, 3)),
    "contrastive": (contrastive, (6, 3)),
    "graph": (graph, (6, 3)),
    "flattened": (in_sequence, (4, 3, 3)),
}


@pytest.mark.parametrize("case", INTERACTING)
def test_exact_is_unbiased_where_terms_meet_in_one_row(case):
    """``B`` of the first layer against the sum over outputs one by one; its noise shrinks with the draws."""
    model, shape = INTERACTING[case]
    x = torch.randn(shape, dtype=DOUBLE)
    params = {"w": torch.randn(4, 3, dtype=DOUBLE), "o": torch.randn(2, 4, dtype=DOUBLE)}
    params = {"w": params["w"]} if case == "contrastive" else params
    layers = lrkfac.find_layers(model, params, x)
    assert (
        "outputs of one example stand at several places of the leading axis"
        if case == "flattened"
        else "outputs of one example depend on others, as with BatchNorm in training mode\ntraining needs no change; "
    ) in str(layers)
    outputs = model(params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "exact")

    def output_factor(noise):
        s = evaluate(params, x, torch.zeros_like(outputs), noise=noise).statistics
        g = s.output_gradients["w"][0].flatten(0, -2)
        return s.scale * g.mT @ g

    draws = torch.rand(4000, outputs[0].numel(), len(outputs), dtype=DOUBLE)
    mean = torch.func.vmap(output_factor, chunk_size=500)(draws).mean(0)

    def preactivation(z, params):  # the first layer's outputs as a variable
        h = F.linear(x, params["w"]) + z
        if case == "contrastive":
            return h @ h.mT
        if case == "graph":
            return NEIGHBOURS @ F.linear(torch.tanh(NEIGHBOURS @ h), params["o"])
        if case == "flattened":
            return F.linear(torch.tanh(h).cumsum(1), params["o"]).flatten(0, 1)
        return F.linear(torch.tanh((h - h.mean(0)) / h.std(0)), params["o"])

    zero = torch.zeros(*shape[:-1], 4, dtype=DOUBLE)
    jacobian = torch.func.jacrev(preactivation)(zero, params)  # [*outputs, *positions, 4]
    g = jacobian.reshape(-1, 4)
    torch.testing.assert_close(mean, g.mT @ g / len(outputs), rtol=0.1, atol=0.05 * float((g * g).sum() / len(outputs)))


def test_structures_of_single_examples_are_refused_where_examples_interact():
    x, params = torch.randn(6, 3), {"w": torch.randn(4, 3), "o": torch.randn(2, 4)}
    layers = lrkfac.find_layers(batch_normalised, params, x)
    for structure in (full(), layer_wise()):
        with pytest.raises(ValueError, match=r"full\(\)|layer_wise\(\) for 'w'.*not apart"):
            lrkfac.precondition_by_fisher(layers, structure, damping=0.1)


def test_buffers_as_long_as_the_batch_are_no_examples():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten(), torch.nn.Linear(80, 5)
    )
    model, params, buffers = lrkfac.from_module(net, buffers=True)
    layers = lrkfac.find_layers(model, params, (buffers, torch.randn(5, 3, 6, 6)))
    assert dict(layers.batch_axes) == {"1": 0} and not layers.uncovered and all(layer.by_example for layer in layers)
