"""Biases and shifts whose weight is no parameter: their blocks of the Fisher matrix, against ``jacrev``."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev
from torch.nn import functional as F

import lrkfac
from lrkfac.structures import dense, kronecker, layer_wise
from tests.tensors import close


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
    net = Net().double()
    for name, p in net.named_parameters():
        nn.init.normal_(p, std=0.5)
        p.requires_grad_(name.endswith(("bias", "again")))
    return net, torch.randint(7, (6, 5))


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


def tied(*biased):
    return Tied(biased).double(), torch.randn(6, 4).double()


def tied_embedding():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).double()
    net[2].weight = net[0].weight
    return net, torch.randint(7, (6,))


Y = torch.arange(6) % 3
EVERY = {"norm.bias", "convolution.bias", "back.bias", "channels.bias", "groups.bias", "head.bias", "again"}
CASES = {
    "alone": (made, EVERY),
    "the first use": (lambda: tied(True, False), {"bias"}),
    "the second use": (lambda: tied(False, True), {"bias"}),
    "two weights": (lambda: tied(True, True), {"bias"}),
    "tied embedding": (tied_embedding, {"2.bias"}),
}


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize(("make", "names"), CASES.values(), ids=CASES)
def test_all_are_covered_and_their_blocks_are_those_of_the_fisher_matrix(make, names, bias):
    """Also a bias at some uses of a weight, or of several; gradients by rows or not, with statistics or without."""
    net, x = make()
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, x, strict=True, bias=bias)
    whole = {layer.weight.path: layer.name for layer in layers if layer.weight.path in names}
    assert whole.keys() == names
    assert {layers[name].kind for name in whole.values()} == ({"bias", "shift"} if make is made else {"bias"})
    grads = grad(lambda p: F.cross_entropy(model(p, x), Y))(params)
    jacobians, p = jacrev(lambda p: model(p, x))(params), model(params, x).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    tx = lrkfac.precondition_by_fisher(layers, layer_wise(), damping=0.1)
    for thin in (False, True):
        evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact", thin=thin)
        for statistics in (False, True):
            evaluation = evaluate(params, x, Y, statistics=statistics)
            close(lrkfac.materialize(evaluation.grads), grads)
        updates, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        for path, name in whole.items():
            fisher = torch.einsum("nci,ncd,ndj->ij", jacobians[path], hessian, jacobians[path]) / len(x)
            close(state.factors[name].block.matrix, fisher)
            damped = fisher + 0.1 * torch.eye(len(fisher), dtype=torch.float64)
            close(updates[path], torch.linalg.solve(damped, grads[path]))


def test_they_are_the_separate_biases_of_a_trained_network():
    """With all weights trained and ``bias="separate"``, layers of biases have these names and factors."""
    net, numbers = made()
    full = copy.deepcopy(net).requires_grad_(True)
    found = []
    for one, bias in ((net, "joint"), (full, "separate")):
        model, params = lrkfac.from_module(one)
        layers = lrkfac.find_layers(model, params, numbers, bias=bias)
        evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact")(params, numbers, Y)
        tx = lrkfac.precondition_by_fisher(layers, kronecker(dense(), dense()), damping=0.1)
        state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[1]
        found.append({layer.name: state.factors[layer.name] for layer in layers if layer.kind == "bias"})
    assert len(found[0]) >= 5 and found[0].keys() <= found[1].keys()
    for name, average in found[0].items():
        close(average, found[1][name])
