"""Arguments and modules at the edge of what ``LowRankKFAC`` takes: a step with the right value, or a clear error."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lrkfac
from lrkfac import LowRankKFAC
from tests.test_optim_loops import ADAPTIVE, KFAC, batches, close, each_chain, joined, network, optimizer_of, plain_loop

np = pytest.importorskip("numpy")
X, Y = torch.randn(8, 6).double(), torch.arange(8) % 3


def normalised(x):
    net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    return LowRankKFAC(net, lrkfac.categorical(), x, 0.1)


OPTIONS_OF_KFAC = r"\['rank', 'damping', 'decay', 'momentum', 'weight_decay', 'kl_clip', .*\].*'statistics_every'"
REFUSED = {
    "misspelt": (lambda net: optimizer_of(net, {**KFAC, "dampng": 1}), "dampng: .*did you mean 'damping'"),
    "all names": (lambda net: optimizer_of(net, {**KFAC, "x": 1}), f"x: .* {OPTIONS_OF_KFAC}"),
    "the optimizer's misspelt": (lambda net: optimizer_of(net, {**KFAC, "sample": 2}), "did you mean 'samples'"),
    "of find_layers": (lambda net: optimizer_of(net, {**KFAC, "bias": "separate"}), "bias: .* it is of find_layers"),
    "of another chain": (lambda net: optimizer_of(net, {**ADAPTIVE, "momentum": 0.5}), "momentum: .*adaptive_low_rank"),
    "of a custom chain": (
        lambda net: optimizer_of(net, {"transformation": lambda layers, factor: lrkfac.scale(-factor), "facter": 1}),
        "facter: .*'factor'",
    ),
    "lr of no number": (lambda net: optimizer_of(net, {**KFAC, "lr": np.array([1.0, 2.0])}), "lr: expected a number"),
    "one example": (lambda net: normalised(X[:1]), r"inputs: \['1'\] in train mode .* pass two examples or more"),
    "one example in a step": (lambda net: normalised(X).step(X[:1], Y[:1]), r"inputs: \['1'\] in train mode"),
}


@pytest.mark.parametrize(("call", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call(network())


def test_all_other_uses_of_groups_without_rate():
    """No rate is missed where none is asked for; copies of groups are plain."""
    net = network()
    optimizer = optimizer_of(net, ADAPTIVE)
    assert "lr" not in optimizer.param_groups[0] and optimizer.param_groups[0].get("lr") is None
    with pytest.raises(KeyError, match="betas"):
        optimizer.param_groups[0]["betas"]
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(TypeError, match=r"lr: the optimizer was made without.*finds its step sizes"):
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert type(optimizer.state_dict()["param_groups"][0]) is dict


RATES = {"float32": np.float32, "float64": np.float64, "[1]": lambda x: torch.tensor([x], dtype=torch.float64)}


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_rates_of_one_number(rate):
    """As optimizers of torch take them; a scheduler halves the rate before the second step."""
    net, data = network(), [joined(parts) for parts in batches()]
    expected = network()
    for one, lr in ((expected, 0.5), (net, rate(0.5))):
        optimizer = optimizer_of(one, KFAC | {"lr": lr})
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for x, y in data:
            optimizer.step(x, y)
            scheduler.step()
    close(net, dict(expected.named_parameters()))
    last = optimizer.param_groups[0]["lr"]
    assert float(last) == 0.5 / 8 and type(last) in (float, torch.Tensor)


class Everything(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, sparse=sparse)
        self.norm, self.convolution = nn.LayerNorm(6), nn.Conv1d(6, 6, 3, padding="same", groups=2)
        self.back, self.attention = nn.ConvTranspose1d(6, 6, 2), nn.MultiheadAttention(6, 2, batch_first=True)
        self.batch_norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, numbers):
        x = self.norm(self.embedding(numbers))
        x = self.batch_norm(self.back(self.convolution(x.mT)).tanh()).mT * self.gain
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


def everything(sparse=False):
    torch.manual_seed(0)
    return Everything(sparse).double(), torch.randint(9, (8, 5)), torch.arange(8) % 3


def trained(net, numbers, y, options):
    torch.manual_seed(2)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), numbers, estimator="exact", statistics_every=2, **options)
    optimizer.step(numbers, y)
    optimizer.step(numbers, y)
    optimizer.evaluate(numbers, y)
    optimizer.step()
    return {name: x.detach().clone() for name, x in net.state_dict().items()}


def of_a_bag(sparse):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(9, 6, sparse=sparse, mode="sum")
    return nn.Sequential(bag, nn.Linear(6, 3)).double(), torch.randint(9, (8, 5)), torch.arange(8) % 3


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("make", "options"), [(everything, ADAPTIVE), (of_a_bag, KFAC)], ids=["embedding", "bag"])
def test_sparse_embeddings_step_as_dense_ones(make, options):
    sparse, numbers, y = make(True)
    dense, *_ = make(False)
    expected = trained(dense, numbers, y, options)
    torch.testing.assert_close(trained(sparse, numbers, y, options), expected, rtol=0, atol=0)
    embedding = next(part for part in sparse.modules() if getattr(part, "sparse", False))
    assert embedding.weight.grad.layout is torch.strided


@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_sparse_gradients_of_functions_are_refused(function):
    with pytest.raises(ValueError, match=f"model: .*{function.__name__} with sparse=True"):
        lrkfac.find_layers(lambda p, x: function(x, p, sparse=True), torch.ones(4, 2), torch.ones(3, 2).long())


@each_chain
def test_the_default_device_may_be_another(options):
    net, numbers, y = everything()
    other = copy.deepcopy(net)
    expected = trained(net, numbers, y, options)
    torch.set_default_device("meta")
    try:
        actual = trained(other, numbers, y, options)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class WithEmpty(nn.ModuleDict):
    def forward(self, x):
        return self.full(x) + self.empty(x[:, : self.empty.in_features]).sum(1, keepdim=True)


@pytest.mark.parametrize(("shape", "bias"), [((0, 3), True), ((0, 3), False), ((6, 0), True), ((0, 0), True)])
def test_layers_without_entries_change_nothing_else(shape, bias):
    """The step of the others, and of a bias, is that without the empty weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch initialises tensors without entries with a warning
        net = WithEmpty({"full": nn.Linear(6, 3), "empty": nn.Linear(*shape, bias=bias)}).double()
    data = [joined(parts) for parts in batches()]
    expected = plain_loop(net, data)
    optimizer = optimizer_of(net)
    for x, y in data:
        optimizer.step(x, y)
    close(net, expected)
    reasons = {p.path: reason for p, reason in optimizer.layers.uncovered}
    assert reasons.pop("empty.weight") == "it has no entries"
    assert ("empty.bias" in reasons) == (bias and shape[1] == 0) and "full.weight" not in reasons
