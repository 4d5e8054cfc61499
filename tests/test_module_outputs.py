"""``from_module`` and ``LowRankKFAC`` of modules that take and return containers."""

import copy
from collections import UserDict

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrkfac
from tests.core.base.test_containers import Object, Output
from tests.test_containers import SCALE, Net, X, Y, close


class Named(Net):
    """What models return in practice: the loss first, then the outputs, then the rest."""

    def forward(self, x, scale, labels=None):
        y = super().forward(x, scale)
        if labels is not None:
            return Output(loss=F.cross_entropy(y, labels), logits=y, hidden=(x, y))
        return Output(logits=y, other=-y, cache=Object(y))


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


@pytest.mark.parametrize("kind", [dict, UserDict, Output])
@pytest.mark.parametrize("labelled", [False, True])
def test_mappings_are_keyword_arguments(kind, labelled):
    net = Named().double()
    model, params = lrkfac.from_module(net)
    inputs = kind(scale=SCALE, x=X, **({"labels": Y} if labelled else {}))
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    found = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, inputs, Y)
    outputs = net(X, SCALE).logits
    loss = F.cross_entropy(outputs, Y)
    close((found.outputs, found.loss), (outputs.detach(), loss.detach()))
    close(tuple(found.grads.values()), torch.autograd.grad(loss, list(net.parameters())))


PICKED = [(Named, "logits", 1), (Named, "other", -1), (Several, 1, 2), (Several, -1, 2)]


@pytest.mark.parametrize(("make", "output", "factor"), PICKED)
def test_output_is_the_name_or_number_of_an_entry(make, output, factor):
    net = make().double()
    model, params = lrkfac.from_module(net, output=output)
    outputs = factor * Net.forward(net, X, SCALE)
    close(optree.tree_leaves(model(params, (X, SCALE)))[0], outputs.detach())
    assert lrkfac.from_module(Several(), output=0)[0](params, (X, SCALE)).ndim == 0


BAD_OUTPUTS = {
    "unknown": (Named, "probabilities", r"entry 'probabilities' .* got Output with \['logits', 'other', 'cache'\]"),
    "name of a tuple": (Several, "logits", "entry 'logits' from the module, got tuple"),
    "name of a tensor": (Net, "logits", "entry 'logits' from the module, got a tensor"),
    "number of names": (Named, 0, "tuple or list with an entry 0 .* got Output with"),
    "number of a tensor": (Net, 0, "tuple or list with an entry 0 .* got a tensor"),
    "too large": (Several, 2, "tuple or list with an entry 2 .* got tuple of length 2"),
}


@pytest.mark.parametrize(("make", "output", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_outputs_that_there_are_not(make, output, message):
    net = make().double()
    with pytest.raises(TypeError, match=message):
        model, params = lrkfac.from_module(net, output=output)
        lrkfac.find_layers(model, params, (X, SCALE))
    with pytest.raises(TypeError, match=message):
        lrkfac.LowRankKFAC(net, lrkfac.categorical(), (X, SCALE), 0.1, output=output)


STEPPED = [
    (Named, None, 1, UserDict),
    (Named, "other", -1, Output),
    (Normalised, None, 1, Output),
    (Normalised, "other", -1, UserDict),
]


@pytest.mark.parametrize(("make", "output", "factor", "kind"), STEPPED)
def test_the_optimizer_takes_containers(make, output, factor, kind):
    """The steps of the same module, plainly written, the last batch smaller; buffers too."""
    net = make().double()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x, scale):
            return factor * self.net(x, scale).logits

    options, twin = {"lr": 0.1, "rank": 2, "statistics_every": 1}, Plain()
    first = lrkfac.LowRankKFAC(net, lrkfac.categorical(), kind(x=X, scale=SCALE), output=output, **options)
    second = lrkfac.LowRankKFAC(twin, lrkfac.categorical(), (X, SCALE), **options)
    for n in (7, 7, 3):
        losses = []
        for optimizer, inputs in ((first, kind(x=X[:n], scale=SCALE[:n])), (second, (X[:n], SCALE[:n]))):
            torch.manual_seed(n)
            losses.append(optimizer.step(inputs, Y[:n]))
        close(*losses)
    close(net.state_dict(), twin.net.state_dict())
