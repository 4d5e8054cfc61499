"""What torch does not document, as the package expects it: a torch that changes it fails here first."""

import functools
import inspect
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lrkfac.core.base import private_torch
from tests.compiling import traced

TESTED = set()


def of_private(name):
    """A test of one function, whose failure says for which torch the function was written."""

    def decorate(test):
        TESTED.add(name)

        @functools.wraps(test)
        def run(*args, **kwargs):
            try:
                return test(*args, **kwargs)
            except Exception as error:
                pytest.fail(
                    f"lrkfac.core.base.private_torch.{name} was written for torch 2.11 to 2.14 and does not do what it "
                    f"says with torch {torch.__version__}; mend it there: {type(error).__name__}: {error}"
                )

        return run

    return decorate


class Recorder(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args, kwargs, private_torch.is_watched()))
        return func(*args, **(kwargs or {}))


def doubled(x, times=1):
    return 2 * times * x


def test_every_function_has_its_test():
    functions = inspect.getmembers(private_torch, inspect.isfunction)
    assert {name for name, f in functions if f.__module__ == private_torch.__name__} == TESTED


@of_private("transformation_level")
def test_transformation_level():
    levels = [private_torch.transformation_level()]

    def note(x):
        levels.append(private_torch.transformation_level())
        return x.sum()

    grad(note)(torch.ones(2))
    vmap(grad(note))(torch.ones(2, 2))
    levels.append(private_torch.transformation_level())
    assert levels == [None, 1, 2, None]


@of_private("is_transformed")
def test_is_transformed():
    seen = []
    note = lambda x: seen.append(private_torch.is_transformed(x)) or x.sum()  # noqa: E731
    x = torch.ones(2)
    note(x)
    grad(note)(x)
    vmap(note)(x)
    jvp(note, (x,), (x,))
    assert seen == [False, True, True, True]


@of_private("transformations")
def test_transformations():
    seen = []
    note = lambda x: seen.append(private_torch.transformations()) or x.sum()  # noqa: E731
    note(torch.ones(2))
    vmap(vmap(grad(note)))(torch.ones(2, 2, 2))
    grad(lambda x: jvp(note, (x,), (x,))[1])(torch.ones(2))
    assert seen == [[], [("vmap", 1), ("vmap", 2), ("grad", 3)], [("grad", 1), ("jvp", 2)]]


@of_private("forward_level")
def test_forward_level():
    levels = [private_torch.forward_level()]
    with torch.autograd.forward_ad.dual_level():
        levels.append(private_torch.forward_level())
    assert [*levels, private_torch.forward_level()] == [-1, 0, -1]


@of_private("with_mapped_axes")
@of_private("without_mapped_axes")
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


@of_private("is_inside_function")
def test_is_inside_function():
    Doubled.seen = ()
    Doubled.apply(torch.ones(2, requires_grad=True))
    grad(lambda x: Doubled.apply(x).sum())(torch.ones(2))
    assert Doubled.seen == (True, True) and not private_torch.is_inside_function()


@of_private("without_checkpoints")
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


@of_private("has_backward_hooks")
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


@of_private("iterates_spectral_norm")
def test_iterates_spectral_norm():
    for function in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        net = function(nn.Linear(2, 2))
        assert any(map(private_torch.iterates_spectral_norm, net.modules()))
        assert not any(map(private_torch.iterates_spectral_norm, net.eval().modules()))


@of_private("has_old_weight_norm")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_has_old_weight_norm():
    assert private_torch.has_old_weight_norm(nn.utils.weight_norm(nn.Linear(2, 2)))
    assert not any(
        map(private_torch.has_old_weight_norm, nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).modules())
    )


@of_private("version")
def test_version():
    x = torch.ones(2)
    before = private_torch.version(x)
    x.view(2, 1).add_(1)
    assert (before, private_torch.version(x)) == (0, 1)


@of_private("is_watched")
def test_is_watched():
    seen = [private_torch.is_watched()]
    with Recorder([]), Recorder([]):
        seen.append(private_torch.is_watched())
    assert [*seen, private_torch.is_watched()] == [False, True, False]


@of_private("hand_to_mode")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hand_to_mode(compiled):
    def run(x):
        outer, inner = [], []
        with Recorder(outer), Recorder(inner):
            result = private_torch.hand_to_mode(doubled, (x,), {"times": 3})
        return result, [len(outer), inner[0][0] is doubled, len(inner), inner[0][3]]

    result, seen = (traced(run) if compiled else run)(torch.ones(2))
    assert result.tolist() == [6.0, 6.0]
    # Inside the inner mode it alone is off: the outer one sees the multiplication.
    assert seen == [1, True, 1, True]


@of_private("intercept")
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


@of_private("fake_mode")
def test_fake_mode():
    """No values and no memory: 2^80 multiplications."""
    constant = torch.ones(4)
    with private_torch.fake_mode():
        x = torch.empty(2**40, 2**20, requires_grad=True)
        y = F.linear(x, torch.empty(4, 2**20)) + constant
        assert y.shape == (2**40, 4) and y.requires_grad


@of_private("is_fake")
def test_is_fake():
    with private_torch.fake_mode():
        x = torch.empty(2) * 2
    assert private_torch.is_fake(x) and not private_torch.is_fake(torch.ones(2)) and not private_torch.is_fake(1)


@of_private("value_errors")
@pytest.mark.parametrize("read", [lambda x: bool(x.sum() > 0), lambda x: x.nonzero(), lambda x: float(x[0])])
def test_value_errors(read):
    with private_torch.fake_mode(), pytest.raises(private_torch.value_errors()):
        read(torch.empty(3))


@of_private("operation_counts")
def test_operation_counts():
    counts, aten = private_torch.operation_counts(), torch.ops.aten
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert counts[aten.mm](a, b, out_val=a @ b) == 2 * 2 * 3 * 5
    assert counts[aten.addmm](torch.ones(5), a, b, out_val=a @ b) == 2 * 2 * 3 * 5
    batch = counts[aten.baddbmm](torch.ones(4, 2, 5), a.expand(4, 2, 3), b.expand(4, 3, 5), out_val=torch.ones(4, 2, 5))
    assert batch == 4 * 2 * 2 * 3 * 5


@of_private("copy_all")
def test_copy_all():
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.float64)]
    pointers = [x.data_ptr() for x in targets]
    private_torch.copy_all(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [x.tolist() for x in targets] == [[1, 1], [2, 2, 2]] and [x.data_ptr() for x in targets] == pointers
