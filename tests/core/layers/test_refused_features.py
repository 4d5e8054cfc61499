"""Features of modules that no pure function has are refused by name, with the remedy."""

import pytest
import torch
from torch import nn

import lrkfac
from lrkfac import LowRankKFAC, evaluator, find_layers, from_module
from tests.core.layers.test_model_features import X, by_autograd, close, flat


def sequence(*wrap):
    torch.manual_seed(0)
    return nn.Sequential(*(f(nn.Linear(4, 4)) for f in wrap), nn.Tanh(), nn.Linear(4, 2)).double()


def with_hook(register, part=0):
    net = sequence(lambda x: x)
    getattr(net[part], register)(lambda *args: None)
    return net


REFUSED = {
    "full backward hook": (
        lambda: with_hook("register_full_backward_hook"), r"module: '0' has backward hooks .*remove them"),
    "backward pre-hook": (lambda: with_hook("register_full_backward_pre_hook", 2), "module: '2' has backward hooks"),
    "spectral_norm": (
        lambda: sequence(nn.utils.parametrizations.spectral_norm),
        r"module: '0.parametrizations.weight.0' is spectral_norm in training mode.*call eval\(\)"),
    "old spectral_norm": (
        lambda: sequence(nn.utils.spectral_norm), r"module: '0' is spectral_norm in training mode.*call eval\(\)"),
    "old weight_norm": (
        lambda: sequence(nn.utils.weight_norm),
        r"module: '0' has the old torch.nn.utils.weight_norm.*use torch.nn.utils.parametrizations.weight_norm"),
}  # fmt: skip
old = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@old
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_modules_that_are_no_functions_are_refused_by_name(make, message):
    net = make()
    for buffers in (False, True):
        with pytest.raises(ValueError, match=message):
            from_module(net, buffers=buffers)
    with pytest.raises(ValueError, match=message):
        LowRankKFAC(net, lrkfac.categorical(), X, lr=0.1)


@old
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "function",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm],
)
def test_the_remedies_work(function):
    """``eval()`` of ``spectral_norm``, also after a pass, and the new ``weight_norm``: gradient and products."""
    net = sequence(function)
    net(X)
    if function is not nn.utils.parametrizations.weight_norm:
        for part in net.modules():
            part.eval()
    model, params = from_module(net)
    layers = find_layers(model, params, X)
    assert [layer.name for layer in layers] == ["0.bias", "2"]
    targets, gradient, matrix = by_autograd(net)
    e = evaluator(model, lrkfac.gaussian(), layers)(params, X, targets)
    close(flat(e.grads), gradient)
    close(flat(e.product(e.grads)), matrix @ gradient)


def test_hooks_that_are_gone_do_not_count():
    net = sequence(lambda x: x)
    net[0].register_full_backward_hook(lambda *args: None).remove()
    net[0].weight.register_hook(lambda g: g).remove()
    assert len(find_layers(*from_module(net), X)) == 2


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused_by_name(register):
    """Also if they come later; on frozen parameters no hook is called anywhere."""
    net, targets = sequence(lambda x: x), torch.arange(6) % 2
    net[0].bias.requires_grad_(False)
    optimizer = LowRankKFAC(net, lrkfac.categorical(), X, lr=0.1)
    optimizer.step(X, targets)
    handle = getattr(net[2].weight, register)(lambda x: None)
    message = r"module: the parameter '2.weight' has a hook \(register_hook\), which is not called.*between evaluate"
    for call in (
        lambda: optimizer.evaluate(X, targets),
        lambda: optimizer.step(X, targets),
        lambda: LowRankKFAC(net, lrkfac.categorical(), X, lr=0.1),
        lambda: from_module(net),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    handle.remove()
    optimizer.step(X, targets)


class Remembering(nn.Module):
    """It keeps its last activations, as attention does for pictures of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.last = None

    def forward(self, x):
        self.last = self.a(x).tanh()
        return self.b(self.last)


def test_a_module_that_keeps_activations():
    net = Remembering().double()
    net(X)
    model, params = from_module(net)
    assert not find_layers(model, params, X).uncovered
    assert torch.equal(model(params, X), net(X))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "DataParallel"])
def test_modules_over_several_processes_are_refused(wrap, tmp_path):
    """Gradients would be those of each process, in silence."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(4, 2))
        net = getattr(nn.parallel, wrap)(net)
        for make in (from_module, lambda net: LowRankKFAC(net, lrkfac.categorical(), X, lr=0.1)):
            if wrap == "DistributedDataParallel" and make is not from_module:
                continue  # taken, with its group
            with pytest.raises(ValueError, match=r"over several processes or devices.*pass the module inside"):
                make(net)
    finally:
        torch.distributed.destroy_process_group()
