"""``from_module``: an unmodified module as a pure function that does what the module does."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrkfac
from lrkfac import evaluator, find_layers, from_module
from tests.tensors import close
from tests.travelling import each_way

X, CLASSES = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def network(*stages):
    torch.manual_seed(0)
    return nn.Sequential(*(stage() for stage in stages)).double()


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


class Several(nn.Module):
    """Several arguments, one of them with a default; a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, y=None, scale=None):
        x, y = x if y is None else (x, y)
        h = torch.tanh(self.first(x)) + self.first(y)
        return self.last(h if scale is None else h * scale)


Y, SCALE = X.flip(0), X.exp()
INPUTS = {
    "tuple": ((X, Y), lambda net: net(X, Y)),
    "dictionary": ({"y": Y, "x": X, "scale": SCALE}, lambda net: net(X, Y, SCALE)),
    "a list is one argument": ([X, Y], lambda net: net([X, Y])),
    "dictionary without the default": ({"y": Y, "x": X}, lambda net: net(X, Y)),
}


@pytest.mark.parametrize(("inputs", "call"), INPUTS.values(), ids=INPUTS.keys())
def test_loss_and_gradients_are_those_by_autograd_through_the_module(inputs, call):
    """The module stays as it was; its parameters are not copied and need no gradient."""
    net = network(Several)[0]
    model, params = from_module(net)
    assert {name: p.data_ptr() for name, p in params.items()} == {n: p.data_ptr() for n, p in net.named_parameters()}
    assert not any(p.requires_grad for p in params.values()) and all(p.requires_grad for p in net.parameters())
    kept, layers, other = state_of(net), find_layers(model, params, inputs), copy.deepcopy(net)
    assert layers["first"].uses == 2 and not layers.uncovered
    outputs = call(other)
    loss = F.cross_entropy(outputs, CLASSES)
    expected = dict(zip(params, torch.autograd.grad(loss, list(other.parameters())), strict=True))
    evaluate = evaluator(model, lrkfac.categorical(), layers)
    for statistics in (True, False):
        e = evaluate(params, inputs, CLASSES, statistics=statistics)
        close((e.outputs, e.loss, e.grads), (outputs.detach(), loss.detach(), expected))
    close(state_of(net), kept)


def test_a_parameter_under_two_names_is_one():
    """Also after it has changed."""
    net = network(Several)[0]
    net.last = nn.Linear(4, 4).double()
    net.last.weight = net.first.weight
    model, params = from_module(net)
    changed = {name: p + 0.1 for name, p in params.items()}
    expected = copy.deepcopy(net)
    expected.load_state_dict({**changed, "last.weight": changed["first.weight"]})
    close(model(changed, (X, Y)), expected(X, Y).detach())
    assert find_layers(model, params, (X, Y))["first"].uses == 3


class MovingAverage(nn.Module):
    """Puts another tensor in the place of its buffer, where BatchNorm changes it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.square().mean(dim=0).detach()
        return x - self.mean


def test_buffers_come_back_as_the_module_would_change_them():
    """Step after step, and nothing that was given is changed."""
    net = network(lambda: nn.Linear(4, 3), lambda: nn.BatchNorm1d(3), MovingAverage)
    model, params, buffers = from_module(net, buffers=True)
    expected, kept = copy.deepcopy(net), state_of(net)
    layers = find_layers(model, params, (buffers, X))
    assert layers["1"].kind == "scale" and not layers.uncovered
    evaluate = evaluator(model, lrkfac.categorical(), layers, has_aux=True)
    for x in (X, 2 * X, X + 1):
        before = optree.tree_map(torch.clone, buffers)
        found, without = (evaluate(params, (buffers, x), CLASSES, statistics=s) for s in (True, False))
        close((buffers, found.outputs), (before, expected(x).detach()))
        for e in (found, without):
            close(e.aux, dict(expected.named_buffers()))
        buffers = found.aux
    close(state_of(net), kept)
    assert buffers["1.num_batches_tracked"] == 3 and not net[1].num_batches_tracked


@each_way
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_what_later_happens_to_the_module_changes_nothing(way, carried, training):
    """Nor where function and layers have travelled: what arrives returns equal bits."""
    net = network(lambda: nn.Linear(4, 3), lambda: nn.BatchNorm1d(3), lambda: nn.Linear(3, 3)).train(training)
    net[0].requires_grad_(False)
    model, params, *buffers = from_module(net, buffers=carried)
    inputs = (*buffers, X) if carried else X
    layers, expected, outputs = find_layers(model, params, inputs), model(params, inputs), copy.deepcopy(net)(X)
    other, described = way((model, layers))
    net.train(not training)
    assert not torch.allclose(copy.deepcopy(net)(X), outputs), "the modes differ"
    net[1].running_var.mul_(4)
    net.register_forward_hook(lambda *_: X)
    close(expected[0] if carried else expected, outputs.detach())
    assert optree.tree_all(optree.tree_map(torch.equal, model(params, inputs), expected))
    net[0].weight.data.zero_()
    assert optree.tree_all(optree.tree_map(torch.equal, other(params, inputs), expected))
    assert described == layers and str(described) == str(layers)
    if not carried:
        assert set(params) == {"1.weight", "1.bias", "2.weight", "2.bias"}, "frozen parameters are constants"


DROPOUT = {
    "module": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Dropout(0.2))), r"0\.1\.0 \(Dropout\).*p=0\.2"),
    "attention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.1), r"0 \(MultiheadAttention\).*p=0\.1"),
    "recurrent": (lambda: nn.RNN(4, 2, 2, dropout=0.1), r"0 \(RNN\).*p=0\.1"),
}


@pytest.mark.parametrize(("make", "message"), DROPOUT.values(), ids=DROPOUT.keys())
def test_dropout_is_refused_by_name_and_accepted_when_off(make, message):
    net = network(make)
    with pytest.raises(ValueError, match=rf"module: {message}.*call eval\(\)"):
        from_module(net)
    from_module(net.eval())
