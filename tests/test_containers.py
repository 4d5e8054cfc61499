"""Inputs, outputs and targets in the containers of the ecosystem: the numbers of the plainly written model."""

import copy
import pickle
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._pytree import register_pytree_node

import lrkfac
from tests.compiling import traced


class Output(OrderedDict):
    """As the outputs of transformers' models: a dictionary with attributes, known to torch's pytree."""

    def __getattr__(self, name):
        return self[name]


register_pytree_node(
    Output, lambda o: (list(o.values()), list(o)), lambda xs, names: Output(zip(names, xs, strict=True))
)


@dataclass
class Batch:
    x: Any
    scale: Any
    power: int = 2


class Pair(NamedTuple):
    x: Any
    scale: Any


class Unknown:
    def __init__(self, x):
        self.x = x


PACKED = {
    "UserDict": (lambda x, s: UserDict(x=x, scale=s), lambda b: (b.data["x"], b.data["scale"])),
    "dataclass": (Batch, lambda b: (b.x, b.scale)),
    "registered": (lambda x, s: Output(x=x, scale=s), lambda b: (b.x, b.scale)),
    "NamedTuple": (Pair, lambda b: (b.x, b.scale)),
    "nested": (
        lambda x, s: {"a": [Batch(UserDict(x=x), Output(b=Pair(1, s)), 3)], "unused": None},
        lambda b: (b["a"][0].x["x"], b["a"][0].scale.b.scale),
    ),
}
RETURNED = {
    "UserDict": lambda y: UserDict(loss=y.sum(), logits=y),
    "dictionary": lambda y: {"also": y.sum(), "logits": y},
    "registered": lambda y: Output(loss=y.sum(), logits=y, cache=Unknown(y)),
    "tensor": lambda y: y,
}
each_packed = pytest.mark.parametrize(("pack", "unpack"), PACKED.values(), ids=PACKED)
each_returned = pytest.mark.parametrize("returned", RETURNED.values(), ids=RETURNED)
each_estimator = pytest.mark.parametrize("estimator", ["mc", "exact", "empirical", "forward_only"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.head((self.first(x) * scale).tanh())


def drawn(n=7):
    generator = torch.Generator().manual_seed(n)
    x, scale = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (4, 1))
    return x, scale, torch.randint(3, (n,), generator=generator)


torch.manual_seed(0)
NET = Net().double()
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}
X, SCALE, Y = drawn()
NOISE = torch.rand(1, 7, 3, dtype=torch.float64)


def plain(params, inputs):
    return functional_call(NET, params, inputs)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def same(found, expected):
    """All numbers of two evaluations, and of their functions."""
    close(found.loss, expected.loss)
    close(found.outputs, expected.outputs)
    for a, b in ((found.grads, expected.grads), (found.statistics, expected.statistics)):
        optree.tree_map(close, a, b)
    u, v = (optree.tree_map(f, PARAMS) for f in (torch.sin, torch.cos))
    optree.tree_map(close, found.product(u), expected.product(u))
    close(found.quadratic(u, v), expected.quadratic(u, v))
    close(found.loss_at(u), expected.loss_at(u))


def evaluators(model, inputs, plain_inputs, estimator="exact", **options):
    layers, others = lrkfac.find_layers(model, PARAMS, inputs), lrkfac.find_layers(plain, PARAMS, plain_inputs)
    assert str(layers) == str(others) and layers.layers == others.layers
    categorical = lrkfac.categorical()
    return lrkfac.evaluator(model, categorical, layers, estimator, **options), lrkfac.evaluator(
        plain, categorical, others, estimator
    )


@each_packed
@each_returned
@each_estimator
def test_evaluations_are_those_of_the_plain_model(pack, unpack, returned, estimator):
    def model(params, inputs):
        return returned(plain(params, unpack(inputs)))

    evaluate, expected = evaluators(model, pack(X, SCALE), (X, SCALE), estimator)
    noise = NOISE if estimator == "mc" else None
    same(evaluate(PARAMS, pack(X, SCALE), Y, noise=noise), expected(PARAMS, (X, SCALE), Y, noise=noise))
    some = torch.tensor([5, 0, 2])
    noise = NOISE[:, :3] if estimator == "mc" else None
    found = evaluate(PARAMS, pack(X, SCALE), Y, examples=some, noise=noise)
    assert all(uses[0].shape[0] == 3 for uses in found.statistics.inputs.values())
    same(found, expected(PARAMS, (X, SCALE), Y, examples=some, noise=noise))


@each_packed
@each_returned
def test_gradients_and_fisher_are_autograds(pack, unpack, returned):
    def model(params, inputs):
        return returned(plain(params, unpack(inputs)))

    evaluate, _ = evaluators(model, pack(X, SCALE), (X, SCALE))
    found = evaluate(PARAMS, pack(X, SCALE), Y)
    loss = lambda p: F.cross_entropy(plain(p, (X, SCALE)), Y)  # noqa: E731
    optree.tree_map(close, found.grads, grad(loss)(PARAMS))
    jacobian = torch.cat([j.flatten(2) for j in jacrev(plain)(PARAMS, (X, SCALE)).values()], 2)
    p = plain(PARAMS, (X, SCALE)).softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    fisher = torch.einsum("nki,nkl,nlj->ij", jacobian, hessian, jacobian) / len(X)
    ones = optree.tree_map(torch.ones_like, PARAMS)
    product = torch.cat([x.flatten() for x in found.product(ones).values()])
    torch.testing.assert_close(product, fisher.sum(1))


@each_packed
def test_a_loop_whose_last_batch_is_smaller(pack, unpack):
    evaluate, expected = evaluators(lambda p, b: plain(p, unpack(b)), pack(X, SCALE), (X, SCALE))
    for first, last, shapes in ((0, 3, 1), (3, 6, 1), (6, 7, 2)):
        x, scale, y = X[first:last], SCALE[first:last], Y[first:last]
        same(evaluate(PARAMS, pack(x, scale), y), expected(PARAMS, (x, scale), y))
        assert len(evaluate.cache) == shapes


def test_types_belong_to_the_key_of_shapes():
    """A model may take another path for another type."""

    def model(params, inputs):
        many = 2 if isinstance(inputs, UserDict) else 1
        y = functional_call(NET, params, (inputs["x"].repeat(many, 1), inputs["scale"].repeat(many, 1)))
        return y[: len(inputs["x"])]

    class Other(UserDict):
        pass

    layers = lrkfac.find_layers(model, PARAMS, UserDict(x=X, scale=SCALE))
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    for make, rows in ((UserDict, 14), (dict, 7), (Output, 7), (Other, 14), (UserDict, 14), (dict, 7)):
        found = evaluate(PARAMS, make(x=X, scale=SCALE), Y)
        assert [uses[0].flatten(0, -2).shape[0] for uses in found.statistics.inputs.values()] == [rows, rows]
    assert len(evaluate.cache) == 4


@each_packed
def test_numbers_in_containers_belong_to_the_key_of_shapes(pack, unpack):
    def model(params, inputs):
        return plain(params, (inputs.x[:, None].expand(-1, inputs.power, -1), inputs.scale[:, None])).mean(1)

    layers = lrkfac.find_layers(model, PARAMS, Batch(X, SCALE))
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")
    for power in (2, 3):
        found = evaluate(PARAMS, Batch(X, SCALE, power), Y)
        assert found.statistics.inputs["head"][0].shape[1] == power


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


@each_packed
def test_ensembles_under_vmap(pack, unpack):
    evaluate, expected = evaluators(lambda p, b: plain(p, unpack(b)), pack(X, SCALE), (X, SCALE))
    members = optree.tree_map(lambda p: torch.stack([p, p + 0.1]), PARAMS)
    found = vmap(lambda p: evaluate(p, pack(X, SCALE), Y)[:2])(members)
    optree.tree_map(close, found, vmap(lambda p: expected(p, (X, SCALE), Y)[:2])(members))


def test_vmap_over_the_examples_of_a_registered_container():
    evaluate, expected = evaluators(lambda p, b: plain(p, (b.x, b.scale)), Output(x=X, scale=SCALE), (X, SCALE))
    inputs = Output(x=X[:, None], scale=SCALE[:, None])
    found = vmap(lambda b, y: evaluate(PARAMS, b, y)[:2])(inputs, Y[:, None])
    one = expected(PARAMS, (X[3:4], SCALE[3:4]), Y[3:4])
    optree.tree_map(close, optree.tree_map(lambda x: x[3], found), one[:2])


def test_evaluations_of_containers_copy_and_pickle():
    model, params = lrkfac.from_module(NET)
    inputs = UserDict(x=X, scale=SCALE)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), lrkfac.find_layers(model, params, inputs))
    found = evaluate(params, inputs, Y, noise=NOISE)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        same(other, found)


def test_the_auxiliary_result_keeps_its_containers():
    """With tensors in them, outside of the derivatives."""

    def model(params, inputs):
        y = plain(params, (inputs.x, inputs.scale))
        return UserDict(logits=y), Batch(y.sum(), [Output(a=y), Pair("text", None)], 7)

    layers = lrkfac.find_layers(model, PARAMS, Batch(X, SCALE))
    found = lrkfac.evaluator(model, lrkfac.categorical(), layers, has_aux=True)(PARAMS, Batch(X, SCALE), Y)
    aux, y = found.aux, plain(PARAMS, (X, SCALE))
    assert type(aux) is Batch and type(aux.scale[0]) is Output and aux.scale[1] == Pair("text", None) and aux.power == 7
    close((aux.x * 2, aux.scale[0].a + 1), (y.sum() * 2, y + 1))


# ----------------------------------------------------------------------------------------------- several heads


class TwoHeads(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.body, self.a, self.b, self.returned = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2), returned

    def forward(self, x):
        h = self.body(x).tanh()
        return self.returned(self.a(h), self.b(h), h)


@dataclass
class Heads:
    a: Any
    b: Any
    hidden: Any = None


HEADS = {
    "UserDict": (lambda a, b, h: UserDict(a=a, b=b), UserDict),
    "UserDict with more": (lambda a, b, h: UserDict(a=a, hidden=Unknown(h), b=b, c=None), UserDict),
    "dataclass": (lambda a, b, h: Heads(a, b, h), UserDict),
    "registered": (lambda a, b, h: Output(loss=h.sum(), b=b, a=a), Output),
    "nested": (lambda a, b, h: UserDict(a=a, b=b), dict),
}


@pytest.mark.parametrize(("returned", "of_targets"), HEADS.values(), ids=HEADS)
@each_estimator
def test_joint_likelihoods_of_containers(returned, of_targets, estimator):
    torch.manual_seed(1)
    net = TwoHeads(returned).double()
    twin = copy.deepcopy(net)
    twin.returned = lambda a, b, h: {"a": a, "b": b}
    targets = {"a": Y, "b": X[:, :2]}
    likelihood = lrkfac.joint({"a": lrkfac.categorical(), "b": lrkfac.gaussian()}, {"a": 1.0, "b": 0.3})
    results = []
    for one, y in ((net, of_targets(targets)), (twin, targets)):
        model, params = lrkfac.from_module(one)
        evaluate = lrkfac.evaluator(model, likelihood, lrkfac.find_layers(model, params, X), estimator)
        noise = {"a": NOISE, "b": NOISE[..., :2]} if estimator == "mc" else None
        results.append(evaluate(params, X, y, noise=noise))
    found, expected = results
    assert found.outputs.keys() == {"a", "b"}
    for i in (0, 1, 2, 4):
        optree.tree_map(close, found[i], expected[i])


# ------------------------------------------------------------------------------------------------------ modules


class Named(Net):
    """What models return in practice: the loss first, then the outputs, then the rest."""

    def forward(self, x, scale, labels=None):
        h = (self.first(x) * scale).tanh()
        y = self.head(h)
        if labels is not None:
            return Output(loss=F.cross_entropy(y, labels), logits=y, hidden=(x, h))
        return Output(logits=y, other=-y, cache=Unknown(h))


class Normalised(Named):
    """With buffers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, scale, labels=None):
        return super().forward(self.norm(x), scale, labels)


class Several(Net):
    def forward(self, x, scale):
        y = super().forward(x, scale)
        return y.sum(), [2 * y, {"b": 3 * y}]


def with_state(make):
    torch.manual_seed(2)
    return make().double()


@pytest.mark.parametrize("kind", [dict, UserDict, Output])
@pytest.mark.parametrize("labelled", [False, True])
def test_mappings_are_keyword_arguments(kind, labelled):
    net = with_state(Named)
    model, params = lrkfac.from_module(net)
    inputs = kind(scale=SCALE, x=X, **({"labels": Y} if labelled else {}))
    close(model(params, inputs).logits, net(X, SCALE).logits.detach())
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    found = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, inputs, Y)
    loss = F.cross_entropy(net(X, SCALE).logits, Y)
    close(found.loss, loss.detach())
    close(tuple(found.grads.values()), torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize(("make", "output", "factor"), [(Named, "other", -1), (Named, "logits", 1), (Named, None, 1)])
def test_output_names_an_entry(make, output, factor):
    net = with_state(make)
    model, params = lrkfac.from_module(net, output=output)
    layers = lrkfac.find_layers(model, params, (X, SCALE))
    found = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, (X, SCALE), Y)
    close(found.outputs, factor * net(X, SCALE).logits.detach())
    close(found.loss, F.cross_entropy(factor * net(X, SCALE).logits, Y).detach())


@pytest.mark.parametrize("output", [1, -1])
def test_output_numbers_an_entry(output):
    net = with_state(Several)
    model, params = lrkfac.from_module(net, output=output)
    close(model(params, (X, SCALE))[0], net(X, SCALE)[1][0].detach())
    assert lrkfac.from_module(net, output=0)[0](params, (X, SCALE)).ndim == 0


def test_output_of_a_module_with_buffers():
    net = with_state(Normalised)
    model, params, buffers = lrkfac.from_module(net, buffers=True, output="other")
    outputs, after = model(params, (buffers, UserDict(x=X, scale=SCALE)))
    close(outputs, -net(X, SCALE).logits.detach())
    optree.tree_map(close, after, dict(net.named_buffers()))


BAD_OUTPUTS = {
    "other type": (Named, 1.5, "output: expected a name, a number or None, got float"),
    "flag": (Named, True, "output: expected a name, a number or None, got bool"),
    "unknown": (Named, "probabilities", r"entry 'probabilities' .* got Output with \['logits', 'other', 'cache'\]"),
    "name of a tuple": (Several, "logits", "entry 'logits' from the module, got tuple"),
    "name of a tensor": (Net, "logits", "entry 'logits' from the module, got a tensor"),
    "number of names": (Named, 0, "tuple or list with an entry 0 .* got Output with"),
    "number of a tensor": (Net, 0, "tuple or list with an entry 0 .* got a tensor"),
    "too large": (Several, 2, "tuple or list with an entry 2 .* got tuple of length 2"),
}


@pytest.mark.parametrize(("make", "output", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_outputs_that_there_are_not(make, output, message):
    net = with_state(make)
    with pytest.raises(TypeError, match=message):
        model, params = lrkfac.from_module(net, output=output)
        lrkfac.find_layers(model, params, (X, SCALE))
    with pytest.raises(TypeError, match=message):
        lrkfac.LowRankKFAC(net, lrkfac.categorical(), (X, SCALE), 0.1, output=output)


@pytest.mark.parametrize(
    ("make", "output", "expected"),
    [(Named, None, 1), (Named, "other", -1), (Normalised, None, 1), (Normalised, "other", -1)],
)
@pytest.mark.parametrize("kind", [UserDict, Output])
def test_the_optimizer_takes_containers(make, output, expected, kind):
    """The steps of the same module, plainly written, the last batch smaller; buffers too."""
    net = with_state(make)
    plainly = copy.deepcopy(net)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plainly

        def forward(self, x, scale):
            return expected * self.net(x, scale).logits

    options = {"lr": 0.1, "rank": 2, "statistics_every": 1}
    first = lrkfac.LowRankKFAC(net, lrkfac.categorical(), kind(x=X, scale=SCALE), output=output, **options)
    second = lrkfac.LowRankKFAC(Plain(), lrkfac.categorical(), (X, SCALE), **options)
    for n in (7, 7, 3):
        losses = []
        for optimizer, inputs in ((first, kind(x=X[:n], scale=SCALE[:n])), (second, (X[:n], SCALE[:n]))):
            torch.manual_seed(n)
            losses.append(optimizer.step(inputs, Y[:n]))
        close(*losses)
    optree.tree_map(close, net.state_dict(), plainly.state_dict())


# ------------------------------------------------------------------------------------------------------ refused


def test_outputs_that_grow_with_a_repeated_row_are_refused():
    """One row for all examples would be a row for each, and the outputs longer: seen in containers, too."""

    def model(params, x):
        return UserDict(logits=torch.cat([F.linear(x, params["v"]), F.linear(torch.ones_like(x[:1]), params["w"])]))

    params = {"v": PARAMS["first.weight"][:3], "w": PARAMS["first.weight"][:3] + 1}
    layers = lrkfac.find_layers(model, params, X)
    with pytest.raises(ValueError, match="are applied to one row for all examples"):
        lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, X, torch.cat([Y, Y[:1]]))


def test_unknown_objects_are_refused_by_name():
    model = lambda p, b: plain(p, (b.x, SCALE))  # noqa: E731
    with pytest.raises(TypeError, match=r"inputs: Unknown holds tensors where they cannot be seen; convert it"):
        lrkfac.find_layers(model, PARAMS, Unknown(X))
    layers = lrkfac.find_layers(plain, PARAMS, (X, SCALE))
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
    with pytest.raises(TypeError, match=r"inputs: Unknown holds tensors .*register_pytree_node"):
        evaluate(PARAMS, Unknown(X), Y)
    with pytest.raises(TypeError, match=r"outputs as a tensor .*, got Unknown; convert it"):
        lrkfac.find_layers(lambda p, x: Unknown(plain(p, x)), PARAMS, (X, SCALE))
    for returned, likelihood, message in (
        (Unknown, lrkfac.categorical(), "model: expected outputs as a tensor.* got Unknown"),
        (lambda y: UserDict(a=y), lrkfac.categorical(), r"got UserDict with \['a'\]; .* from_module\(module, output="),
        (lambda y: UserDict(a=Unknown(y)), lrkfac.joint({"a": lrkfac.categorical()}), "model: .*Unknown"),
        (lambda y: UserDict(b=y), lrkfac.joint({"a": lrkfac.categorical()}), r"missing \['a'\], unexpected \['b'\]"),
    ):
        evaluate = lrkfac.evaluator(lambda p, x, r=returned: r(plain(p, x)), likelihood, layers)
        with pytest.raises(TypeError, match=message):
            evaluate(PARAMS, (X, SCALE), Y if isinstance(likelihood, lrkfac.Likelihood) else {"a": Y}, statistics=False)
    evaluate = lrkfac.evaluator(plain, lrkfac.categorical(), layers)
    with pytest.raises(TypeError, match=r"targets: expected a tensor, got UserDict with \['a'\]"):
        evaluate(PARAMS, (X, SCALE), UserDict(a=Y))
    evaluate = lrkfac.evaluator(lambda p, x: (y := plain(p, x), Unknown(y)), lrkfac.categorical(), layers, has_aux=True)
    with pytest.raises(TypeError, match=r"model: aux: Unknown holds tensors"):
        evaluate(PARAMS, (X, SCALE), Y)
