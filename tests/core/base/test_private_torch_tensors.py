"""The rest of ``test_private_torch``: what torch does with tensors and trees of them, as the package expects it."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import register_pytree_node

from lrkfac.core.base import private_torch
from tests.compiling import traced


def test_operation_counts():
    counts, aten = private_torch.operation_counts(), torch.ops.aten
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert counts[aten.mm](a, b, out_val=a @ b) == 2 * 2 * 3 * 5
    assert counts[aten.addmm](torch.ones(5), a, b, out_val=a @ b) == 2 * 2 * 3 * 5
    batch = counts[aten.baddbmm](torch.ones(4, 2, 5), a.expand(4, 2, 3), b.expand(4, 3, 5), out_val=torch.ones(4, 2, 5))
    assert batch == 4 * 2 * 2 * 3 * 5


def test_multiplied_all():
    xs = [torch.ones(2), torch.full((3,), 2.0)]
    for scale in (3.0, torch.tensor(3.0)):
        scaled = private_torch.multiplied_all(xs, scale)
        assert torch.equal(scaled[0], 3 * xs[0]) and torch.equal(scaled[1], 3 * xs[1])
    with pytest.raises(RuntimeError, match="Batching rule"):  # else trees could be changed in one call there, too
        vmap(lambda x: private_torch.multiplied_all([x, x], 2.0)[0])(torch.ones(2, 3))


def test_added_all():
    added = private_torch.added_all([torch.ones(2), torch.ones(3)], -0.5, [torch.ones(2), torch.zeros(3)])
    assert torch.equal(added[0], torch.full((2,), 0.5)) and torch.equal(added[1], torch.ones(3))


def test_copy_all():
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.float64)]
    pointers = [x.data_ptr() for x in targets]
    private_torch.copy_all(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [x.tolist() for x in targets] == [[1, 1], [2, 2, 2]] and [x.data_ptr() for x in targets] == pointers


def test_is_differentiated():
    """Also where the compiler asks."""

    def run(x):
        return x * private_torch.is_differentiated()

    def summed(x):
        return run(x).sum()

    x = torch.ones(2, 2)
    for f in (run, traced(run)):
        assert not f(x).any() and not vmap(f)(x).any() and not f(x).any()
        assert grad(lambda x, f=f: f(x).sum())(x).all() and not f(x).any()
    assert grad(lambda x: vmap(run)(x).sum())(x).all() and vmap(grad(summed))(x).all()
    assert jvp(run, (x,), (x,))[1].all() and traced(grad(summed))(x).all() and not traced(vmap(run))(x).any()


def test_is_mapped():
    def run(x):
        return x * private_torch.is_mapped()

    x = torch.ones(2, 2)
    for f in (run, traced(run)):
        assert not f(x).any() and vmap(f)(x).all() and not f(x).any()
    assert not grad(lambda x: run(x).sum())(x).any() and traced(vmap(run))(x).all()


def test_within_vmap():
    shapes = []

    def note(x):
        shapes.append(private_torch.within_vmap(x))
        return x.sum()

    x = torch.ones(2, 3, 4, requires_grad=True)
    note(x)
    vmap(vmap(note))(x)
    assert [x.shape for x in shapes] == [(2, 3, 4)] * 2 and all(x.requires_grad for x in shapes)


def test_weak_reference():
    """The gradient of a parameter has no name in Python, and is the same object whenever it is asked for."""
    x = torch.nn.Parameter(torch.ones(2))
    x.grad = torch.zeros(2)
    reference = private_torch.weak_reference(x.grad)
    assert reference() is x.grad
    x.grad = None
    assert reference() is None


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


def test_a_type_without_leaves_stays_part_of_the_structure():
    class Noted:
        def __init__(self, text):
            self.text = text

    private_torch.register_without_leaves(Noted)
    noted = Noted("x")
    found, note = torch.func.vmap(lambda x: (2 * x, noted))(torch.ones(3))
    assert note is noted and torch.equal(found, 2 * torch.ones(3))


def test_tensor_without_values():
    class Shape(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    for mode in (nullcontext, private_torch.fake_mode):
        with mode():
            x = private_torch.tensor_without_values(Shape, torch.Size([2, 3]), torch.float64, torch.device("cpu"))
            assert torch.sin(x) is torch.sin
            with torch._C.DisableTorchFunctionSubclass():
                assert x.shape == (2, 3) and x.dtype == torch.float64
