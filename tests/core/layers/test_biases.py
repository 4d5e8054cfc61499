"""Biases and shifts whose weight is no parameter: their blocks of the Fisher matrix, against ``jacrev``."""

import copy

import pytest
import torch
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F

import lrkfac
from lrkfac.structures import dense, kronecker, layer_wise


class Net(nn.Module):
    """Every operation that adds a bias."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.convolution, self.back = nn.Conv1d(4, 6, 2, groups=2), nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.channels, self.groups = nn.BatchNorm1d(4).eval(), nn.GroupNorm(2, 4)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.again = nn.Parameter(torch.randn(4))

    def forward(self, numbers):
        x = self.norm(self.embedding(numbers))
        x = self.groups(self.channels(self.back(self.convolution(x.mT).tanh()))).mT
        x = torch.addmm(self.again, (x + self.attention(x, x, x)[0]).mean(1), torch.eye(4, dtype=x.dtype)).tanh()
        return self.head(x)


def made():
    torch.manual_seed(0)
    net, numbers = Net().double(), torch.randint(7, (6, 5))
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith(("bias", "again")))
    return net, numbers, torch.arange(6) % 3


def fisher(model, params, numbers):
    """The Fisher matrix of the mean loss, by the Jacobians of all outputs and the covariance of the classes."""
    jacobians = jacrev(lambda p: model(p, numbers))(params)
    p = model(params, numbers).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return {
        name: torch.einsum("nci,ncd,ndj->ij", j.flatten(2), hessian, j.flatten(2)) / len(numbers)
        for name, j in jacobians.items()
    }


def test_all_are_covered_and_their_blocks_are_those_of_the_fisher_matrix():
    net, numbers, y = made()
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, numbers, strict=True)
    evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, numbers, y)
    tx = lrkfac.precondition_by_fisher(layers, layer_wise(), damping=0.1)
    updates, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
    expected = fisher(model, params, numbers)
    grads = dict(zip(params, torch.autograd.grad(F.cross_entropy(net(numbers), y), _trained(net)), strict=True))
    whole = {layer.weight.path: layer.name for layer in layers if len(layer.weight.view) == 1}
    assert whole.keys() >= {"norm.bias", "convolution.bias", "back.bias", "channels.bias", "groups.bias", "head.bias"}
    for path, name in whole.items():
        torch.testing.assert_close(state.factors[name].block.matrix, expected[path], rtol=1e-8, atol=1e-12)
        damped = expected[path] + 0.1 * torch.eye(len(grads[path]), dtype=torch.float64)
        torch.testing.assert_close(updates[path], torch.linalg.solve(damped, grads[path]), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(evaluation.grads, grads, rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    """One weight twice, with its bias at the first use, the second, or, of two weights, at both."""

    def __init__(self, biased):
        super().__init__()
        self.one, self.bias, self.head = nn.Linear(4, 4, bias=False), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)
        self.other = nn.Linear(4, 4, bias=False) if all(biased) else self.one
        self.biased = biased

    def forward(self, x):
        for part, biased in zip((self.one, self.other), self.biased, strict=True):
            x = F.linear(x, part.weight, self.bias if biased else None).tanh()
        return self.head(x)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, numbers):
        return self.head(self.embedding(numbers).tanh())


SHARED = {
    "the first use": (lambda: Tied((True, False)), "bias"),
    "the second use": (lambda: Tied((False, True)), "bias"),
    "two weights": (lambda: Tied((True, True)), "bias"),
    "tied embedding": (LanguageModel, "head.bias"),
}


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize(("make", "name"), SHARED.values(), ids=SHARED)
def test_a_bias_at_some_uses_of_a_weight_or_of_several_is_a_layer(make, name, bias):
    torch.manual_seed(0)
    net, y = make().double(), torch.arange(6) % 3
    x = torch.randint(7, (6,)) if isinstance(net, LanguageModel) else torch.randn(6, 4).double()
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, x, strict=True, bias=bias)
    assert layers[name].kind == "bias" and not layers.uncovered
    tx, expected = lrkfac.precondition_by_fisher(layers, layer_wise(), damping=0.1), fisher(model, params, x)
    grads = dict(zip(params, torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())), strict=True))
    for thin in (False, True):
        evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact", thin=thin)
        for statistics in (False, True):
            evaluation = evaluate(params, x, y, statistics=statistics)
            torch.testing.assert_close(lrkfac.materialize(evaluation.grads), grads, rtol=1e-9, atol=1e-12)
        state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[1]
        torch.testing.assert_close(state.factors[name].block.matrix, expected[name], rtol=1e-8, atol=1e-12)


def _trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def test_they_are_the_separate_biases_of_a_trained_network():
    """With all weights trained and ``bias="separate"``, layers of biases have these names and factors."""
    net, numbers, y = made()
    full = copy.deepcopy(net).requires_grad_(True)
    found = []
    for one, bias in ((net, "joint"), (full, "separate")):
        model, params = lrkfac.from_module(one)
        layers = lrkfac.find_layers(model, params, numbers, bias=bias)
        evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, numbers, y)
        tx = lrkfac.precondition_by_fisher(layers, kronecker(dense(), dense()), damping=0.1)
        state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[1]
        found.append({layer.name: state.factors[layer.name] for layer in layers if layer.kind == "bias"})
    assert len(found[0]) >= 5 and found[0].keys() <= found[1].keys()
    for name, average in found[0].items():
        torch.testing.assert_close(average, found[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"lr": 0.1, "rank": 4}, {"transformation": lrkfac.adaptive_low_rank_kfac}])
def test_the_class_trains_biases_alone(options):
    net, numbers, y = made()
    before = {name: p.clone() for name, p in net.named_parameters()}
    optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), numbers, params=_trained(net), **options)
    losses = [float(optimizer.step(numbers, y)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0] and not optimizer.layers.uncovered
    unchanged = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert unchanged == {name for name, p in net.named_parameters() if not p.requires_grad}
