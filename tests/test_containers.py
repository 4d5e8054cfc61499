"""Inputs, outputs and targets in the containers of the ecosystem: the numbers of the plainly written model."""

import copy
import pickle
from collections import UserDict
from dataclasses import make_dataclass
from functools import partial

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

import lrkfac
from tests.compiling import traced
from tests.core.base.test_containers import Batch, Frozen, Object, Output, Pair

PACKED = {
    "UserDict": (lambda x, s: UserDict(x=x, scale=s), lambda b: (b.data["x"], b.data["scale"])),
    "dataclass": (Batch, lambda b: (b.x, b.mask)),
    "registered": (lambda x, s: Output(x=x, scale=s), lambda b: (b.x, b.scale)),
    "NamedTuple": (Pair, lambda b: (b.left, b.right)),
    "nested": (
        lambda x, s: {"a": [Frozen((UserDict(x=x), Output(b=Pair(1, s)), 3))], "unused": None},
        lambda b: (b["a"][0].x[0]["x"], b["a"][0].x[1].b.right),
    ),
}
RETURNED = {
    "UserDict": lambda y: UserDict(loss=y.sum(), logits=y),
    "dictionary": lambda y: {"also": y.sum(), "logits": y},
    "registered": lambda y: Output(loss=y.sum(), logits=y, cache=Object(y)),
    "tensor": lambda y: y,
}
ESTIMATORS = ["mc", "exact", "empirical", "forward_only"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.head((self.first(x) * scale).tanh())


torch.manual_seed(0)
NET = Net().double()
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}
X, SCALE, Y = torch.randn(7, 4).double(), torch.randn(7, 1).double(), torch.randint(3, (7,))
NOISE = torch.rand(1, 7, 3, dtype=torch.float64)
BATCHES = [(slice(4), None), (slice(3, 7), None), (slice(7), None), (slice(7), torch.tensor([5, 0, 2]))]


def plain(params, inputs):
    return functional_call(NET, params, inputs)


LAYERS = lrkfac.find_layers(plain, PARAMS, (X, SCALE))


def close(found, expected):
    """Tensors in any containers."""
    optree.tree_map(partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14), found, expected)


def same(found, expected):
    """All numbers of two evaluations, and of their functions."""
    u, v = (optree.tree_map(f, PARAMS) for f in (torch.sin, torch.cos))
    functions = lambda e: (e.product(u), e.quadratic(u, v), e.loss_at(u))  # noqa: E731
    close(*((e.loss, e.outputs, e.grads, e.statistics, *functions(e)) for e in (found, expected)))


def evaluator(model, inputs, estimator="exact", **options):
    layers = lrkfac.find_layers(model, PARAMS, inputs)
    assert str(layers) == str(LAYERS) and layers.layers == LAYERS.layers
    return lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("packed", PACKED)
def test_evaluations_are_those_of_the_plain_model(packed, estimator):
    """Of all examples, of some, and in a loop whose last batch is smaller; each container of inputs and each estimator
    with each of outputs.
    """
    pack, unpack = PACKED[packed]
    number = list(PACKED).index(packed) + ESTIMATORS.index(estimator)
    returned = list(RETURNED.values())[number % len(RETURNED)]
    evaluate = evaluator(lambda p, inputs: returned(plain(p, unpack(inputs))), pack(X, SCALE), estimator)
    expected = lrkfac.evaluator(plain, lrkfac.categorical(), LAYERS, estimator)
    for (rows, examples), shapes in zip(BATCHES, (1, 1, 2, 3), strict=True):
        number = len(Y[rows]) if examples is None else len(examples)
        options = {"noise": NOISE[:, :number] if estimator == "mc" else None, "examples": examples}
        found = evaluate(PARAMS, pack(X[rows], SCALE[rows]), Y[rows], **options)
        assert len(evaluate.cache) == shapes
        assert all(uses[0].shape[0] == number for uses in found.statistics.inputs.values())
        same(found, expected(PARAMS, (X[rows], SCALE[rows]), Y[rows], **options))


def test_types_and_numbers_of_containers_belong_to_the_key_of_shapes():
    """A model may take another path for another of them."""

    class Other(UserDict):
        pass

    def model(params, inputs):
        if isinstance(inputs, Batch):
            x, scale, many = inputs.x, inputs.mask, inputs.length
        else:
            x, scale, many = inputs["x"], inputs["scale"], 2 if isinstance(inputs, UserDict) else 1
        return plain(params, (x.repeat(many, 1), scale.repeat(many, 1)))[:7]

    layers = lrkfac.find_layers(model, PARAMS, UserDict(x=X, scale=SCALE))
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    made = [(make(x=X, scale=SCALE), many) for make, many in ((UserDict, 2), (dict, 1), (Output, 1), (Other, 2))]
    for inputs, many in (*made, (Batch(X, SCALE, 2), 2), (Batch(X, SCALE, 3), 3), *made):
        found = evaluate(PARAMS, inputs, Y)
        assert [uses[0].flatten(0, -2).shape[0] for uses in found.statistics.inputs.values()] == [7 * many] * 2
    assert len(evaluate.cache) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "returned", "whole"),
    [("UserDict", "registered", True), ("dataclass", "UserDict", False), ("nested", "tensor", False)],
)
def test_compiled_the_same_as_eager(packed, returned, whole):
    """In one graph, container and all: an evaluation, or the step with it."""
    torch.compiler.reset()
    pack, unpack = PACKED[packed]
    model = lambda p, b: RETURNED[returned](plain(p, unpack(b)))  # noqa: E731
    layers = lrkfac.find_layers(model, PARAMS, pack(X, SCALE))
    evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), lrkfac.low_rank_kfac(layers, 0.1, rank=2)

    def step(params, state, inputs, targets, noise):
        e = evaluate(params, inputs, targets, noise=noise)
        if not whole:
            return e.loss, e.outputs, e.grads, e.statistics
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state, e.loss

    compiled = traced(step)
    for n in (7, 3):
        batch = (PARAMS, tx.init(PARAMS), pack(X[:n], SCALE[:n]), Y[:n], NOISE[:, :n])
        for a, b in zip(*(optree.tree_leaves(f(*batch)) for f in (compiled, step)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_ensembles_and_examples_under_vmap():
    pack, unpack = PACKED["nested"]
    evaluate = evaluator(lambda p, b: plain(p, unpack(b)), pack(X, SCALE))
    expected = lrkfac.evaluator(plain, lrkfac.categorical(), LAYERS, "exact")
    members = optree.tree_map(lambda p: torch.stack([p, p + 0.1]), PARAMS)
    found = vmap(lambda p: evaluate(p, pack(X, SCALE), Y)[:2])(members)
    close(found, vmap(lambda p: expected(p, (X, SCALE), Y)[:2])(members))
    evaluate = evaluator(lambda p, b: plain(p, (b.x, b.scale)), Output(x=X, scale=SCALE))
    examples = Output(x=X[:, None], scale=SCALE[:, None])
    found = vmap(lambda b, y: evaluate(PARAMS, b, y)[:2])(examples, Y[:, None])
    close(optree.tree_map(lambda x: x[3], found), expected(PARAMS, (X[3:4], SCALE[3:4]), Y[3:4])[:2])


def test_evaluations_of_containers_copy_and_pickle():
    model, _ = lrkfac.from_module(NET)
    inputs = UserDict(x=X, scale=SCALE)
    found = evaluator(model, inputs)(PARAMS, inputs, Y)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        same(other, found)


def test_the_auxiliary_result_keeps_its_containers():
    """With tensors in them, outside of the derivatives."""

    def model(params, inputs):
        y = plain(params, (inputs.x, inputs.mask))
        return UserDict(logits=y), Batch(y.sum(), [Output(a=y), Pair("text", None)], 7)

    aux = evaluator(model, Batch(X, SCALE), has_aux=True)(PARAMS, Batch(X, SCALE), Y).aux
    y = plain(PARAMS, (X, SCALE))
    assert type(aux) is Batch and type(aux.mask[0]) is Output and aux.mask[1] == Pair("text", None) and aux.length == 7
    close((aux.x * 2, aux.mask[0].a + 1), (y.sum() * 2, y + 1))


class TwoHeads(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.body, self.a, self.b, self.returned = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2), returned

    def forward(self, x):
        h = self.body(x).tanh()
        return self.returned(self.a(h), self.b(h), h)


HEADS = {
    "UserDict": (lambda a, b, h: UserDict(a=a, hidden=Object(h), b=b, c=None), UserDict),
    "dataclass": (make_dataclass("Heads", ["a", "b", "hidden"]), UserDict),
    "registered": (lambda a, b, h: Output(loss=h.sum(), b=b, a=a), Output),
    "dictionary of targets": (lambda a, b, h: UserDict(a=a, b=b), dict),
}


@pytest.mark.parametrize(("returned", "of_targets"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_joint_likelihoods_of_containers(returned, of_targets, estimator):
    net, results = TwoHeads(returned).double(), []
    twin = copy.deepcopy(net)
    twin.returned = lambda a, b, h: {"a": a, "b": b}
    targets = {"a": Y, "b": X[:, :2]}
    likelihood = lrkfac.joint({"a": lrkfac.categorical(), "b": lrkfac.gaussian()}, {"a": 1.0, "b": 0.3})
    noise = {"a": NOISE, "b": NOISE[..., :2]} if estimator == "mc" else None
    for one, y in ((net, of_targets(targets)), (twin, targets)):
        model, params = lrkfac.from_module(one)
        evaluate = lrkfac.evaluator(model, likelihood, lrkfac.find_layers(model, params, X), estimator)
        results.append(evaluate(params, X, y, noise=noise))
    assert results[0].outputs.keys() == {"a", "b"}
    close(*((e.loss, e.grads, e.outputs, e.statistics) for e in results))


def evaluated(model, inputs=(X, SCALE), targets=Y, likelihood=lrkfac.categorical(), **options):  # noqa: B008
    return lrkfac.evaluator(model, likelihood, LAYERS, **options)(PARAMS, inputs, targets, statistics=False)


def returning(returned, **options):
    return evaluated(lambda p, x: returned(plain(p, x)), **options)


OF_A = {"likelihood": lrkfac.joint({"a": lrkfac.categorical()}), "targets": {"a": Y}}
REFUSED = {
    "inputs of layers": (
        lambda: lrkfac.find_layers(lambda p, b: plain(p, (b.x, SCALE)), PARAMS, Object(X)),
        "inputs: Object holds tensors where they cannot be seen; convert it",
    ),
    "inputs": (lambda: evaluated(plain, Object(X)), "inputs: Object holds tensors .*register_pytree_node"),
    "outputs of layers": (
        lambda: lrkfac.find_layers(lambda p, x: Object(plain(p, x)), PARAMS, (X, SCALE)),
        r"outputs as a tensor .*, got Object; convert it",
    ),
    "outputs": (lambda: returning(Object), "model: expected outputs as a tensor.* got Object"),
    "outputs without logits": (
        lambda: returning(lambda y: UserDict(a=y)),
        r"got UserDict with \['a'\]; .* from_module\(module, output=",
    ),
    "a head": (lambda: returning(lambda y: UserDict(a=Object(y)), **OF_A), "model: .*Object"),
    "heads": (lambda: returning(lambda y: UserDict(b=y), **OF_A), r"missing \['a'\], unexpected \['b'\]"),
    "targets": (
        lambda: evaluated(plain, targets=UserDict(a=Y)),
        r"targets: expected a tensor, got UserDict with \['a'\]",
    ),
    "aux": (lambda: returning(lambda y: (y, Object(y)), has_aux=True), "model: aux: Object holds tensors"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_objects_that_cannot_be_opened_are_refused_by_name(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_outputs_that_grow_with_a_repeated_row_are_seen():
    """One row for all examples would be a row for each, and the outputs longer: its weight is uncovered."""

    def model(params, x):
        return UserDict(logits=torch.cat([F.linear(x, params["v"]), F.linear(torch.ones_like(x[:1]), params["w"])]))

    params = {"v": PARAMS["first.weight"][:3], "w": PARAMS["first.weight"][:3] + 1}
    layers, targets = lrkfac.find_layers(model, params, X), torch.cat([Y, Y[:1]])
    assert [p.path for p, _ in layers.uncovered] == ["w"]
    loss = lambda p: F.cross_entropy(model(p, X)["logits"], targets)  # noqa: E731
    grads = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, X, targets).grads
    torch.testing.assert_close(grads, torch.func.grad(loss)(params))
