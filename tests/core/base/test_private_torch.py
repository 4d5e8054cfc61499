"""What torch does not document, as the package expects it: a torch that changes it fails here first."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import register_pytree_node

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


@of_private("registered_container")
def test_registered_container():
    class Pair:
        def __init__(self, left, right):
            self.left, self.right = left, right

    class Derived(Pair):
        pass

    register_pytree_node(Pair, lambda x: ([x.left, x.right], "context"), lambda xs, context: (*xs, context))
    apart, together = private_torch.registered_container(Pair)
    assert apart(Pair(1, 2)) == ([1, 2], "context") and together([3, 4], "other") == (3, 4, "other")
    assert private_torch.registered_container(Derived) is None and private_torch.registered_container(int) is None
