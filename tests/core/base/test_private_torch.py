"""What torch does not document, as the package expects it: a torch that changes it fails here first.

``lrkfac.core.base.private_torch`` was written for torch 2.11 to 2.14: what fails here is to be mended there.
"""

import inspect
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lrkfac.core.base import private_torch
from tests.compiling import traced


class Recorder(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, private_torch.is_watched()))
        return func(*args, **(kwargs or {}))


def doubled(x, times=1):
    return 2 * times * x


def test_every_function_has_its_test():
    functions = inspect.getmembers(private_torch, inspect.isfunction)
    named = [name for name, f in functions if f.__module__ == private_torch.__name__]
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_private_torch*.py"))
    assert named and all(f"private_torch.{name}(" in source for name in named)


def test_transformations():
    levels, kinds, transformed, x = [], [], [], torch.ones(2, 2)

    def note(x):
        levels.append(private_torch.transformation_level())
        kinds.append(private_torch.transformations())
        transformed.append(private_torch.is_transformed(x))
        return x.sum()

    note(x)
    grad(note)(x)
    vmap(note)(x)
    vmap(grad(note))(x)
    jvp(note, (x,), (x,))
    note(x)
    assert levels == [None, 1, 1, 2, 1, None] and transformed == [False, True, True, True, True, False]
    assert kinds == [[], [("grad", 1)], [("vmap", 1)], [("vmap", 1), ("grad", 2)], [("jvp", 1)], []]


def test_forward_level():
    levels = [private_torch.forward_level()]
    with torch.autograd.forward_ad.dual_level():
        levels.append(private_torch.forward_level())
    assert [*levels, private_torch.forward_level()] == [-1, 0, -1]


def test_with_and_without_mapped_axes():
    x = torch.arange(24.0).reshape(2, 3, 4)

    def inner(row):
        whole = private_torch.with_mapped_axes(row, [1, 2])
        assert torch.equal(whole, x.permute(2, 0, 1)) and not private_torch.is_transformed(whole)
        assert private_torch.with_mapped_axes(x, [1, 2]) is None
        back = private_torch.without_mapped_axes(whole * 2, [1, 2])
        assert back.shape == row.shape == (3,)
        return back - row

    assert torch.equal(vmap(vmap(inner), in_dims=2)(x), x.permute(2, 0, 1))
    seen = []
    vmap(lambda part: seen.append(private_torch.with_mapped_axes(part, [1])) or part, in_dims=2)(x)
    assert torch.equal(seen[0], x.permute(2, 0, 1))


class Doubled(torch.autograd.Function):
    seen = ()

    @staticmethod
    def forward(x):
        Doubled.seen = (*Doubled.seen, private_torch.is_inside_function())
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_is_inside_function():
    Doubled.seen = ()
    Doubled.apply(torch.ones(2, requires_grad=True))
    grad(lambda x: Doubled.apply(x).sum())(torch.ones(2))
    assert Doubled.seen == (True, True) and not private_torch.is_inside_function()


@pytest.mark.parametrize("reentrant", [False, True])
def test_without_checkpoints(reentrant):
    """The function runs once, and again in the backward pass only outside of the context, whichever ends first."""
    calls = []

    def run():
        x, before = torch.ones(2, requires_grad=True), len(calls)
        checkpoint(lambda x: calls.append(x) or x.sin(), x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, torch.ones(2).cos())
        return len(calls) - before

    with ExitStack() as first:
        first.enter_context(private_torch.without_checkpoints())
        second = ExitStack()
        second.enter_context(private_torch.without_checkpoints())
    counts = [run()]
    second.close()
    assert [*counts, run()] == [1, 2]


def test_has_backward_hooks():
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        part = nn.Linear(2, 2)
        handle = getattr(part, register)(lambda *args: None)
        assert private_torch.has_backward_hooks(part)
        handle.remove()
        assert not private_torch.has_backward_hooks(part)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(part.weight, register)(lambda *args: None)
        assert private_torch.has_backward_hooks(part.weight) and not private_torch.has_backward_hooks(part.bias)
        handle.remove()
        assert not private_torch.has_backward_hooks(part.weight)


def test_iterates_spectral_norm():
    for function in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        net = function(nn.Linear(2, 2))
        assert any(private_torch.iterates_spectral_norm(part) for part in net.modules())
        assert not any(private_torch.iterates_spectral_norm(part) for part in net.eval().modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_has_old_weight_norm():
    assert private_torch.has_old_weight_norm(nn.utils.weight_norm(nn.Linear(2, 2)))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert not any(private_torch.has_old_weight_norm(part) for part in new.modules())


def test_version():
    x = torch.ones(2)
    before = private_torch.version(x)
    x.view(2, 1).add_(1)
    assert (before, private_torch.version(x)) == (0, 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_modes(compiled):
    """A function handed to the inner of two: inside it that one alone is off, the outer one sees the multiplication."""

    def run(x):
        outer, inner = [], []
        with Recorder(outer), Recorder(inner):
            result = private_torch.hand_to_mode(doubled, (x,), {"times": 3})
        return result, [len(outer), inner[0][0] is doubled, len(inner), inner[0][1]]

    result, seen = (traced(run) if compiled else run)(torch.ones(2))
    assert result.tolist() == [6.0, 6.0] and seen == [1, True, 1, True] and not private_torch.is_watched()


def test_intercept():
    seen = []

    def handle(operation, args, kwargs):
        seen.append(operation.overloadpacket)
        return operation(*args, **kwargs) + 1 if operation.overloadpacket is torch.ops.aten.mul else operation(*args)

    with private_torch.intercept(handle):
        result = torch.ones(2).mul(3)
    assert result.tolist() == [4.0, 4.0] and torch.ops.aten.mul in seen
    with private_torch.intercept(handle):
        torch.rand(2)
    assert any(torch.Tag.nondeterministic_seeded in packet.default.tags for packet in seen)


def test_fakes():
    """No values and no memory: 2^80 multiplications."""
    constant = torch.ones(4)
    with private_torch.fake_mode():
        x = torch.empty(2**40, 2**20, requires_grad=True)
        y = F.linear(x, torch.empty(4, 2**20)) + constant
        assert y.shape == (2**40, 4) and y.requires_grad
        for read in (lambda x: bool(x.sum() > 0), lambda x: x.nonzero(), lambda x: float(x[0])):
            with pytest.raises(private_torch.value_errors()):
                read(torch.empty(3))
    assert private_torch.is_fake(y) and not private_torch.is_fake(constant) and not private_torch.is_fake(1)
