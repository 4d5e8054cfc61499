"""Stacks without copies are what stacks are, and only parts of one stack are taken for it."""

import pytest
import torch
from torch.func import grad, vmap

from lrkfac.core.base.stacks import evenly_spaced, neighbours, picked, stacked
from lrkfac.core.base.trees import selected
from tests.dispatch import Launches

WHOLE = torch.arange(48.0).reshape(4, 3, 4)
ONE_AFTER_ANOTHER = {
    "parts of a stack": WHOLE.unbind(),
    "the last parts": WHOLE.unbind()[1:],
    "numbers": torch.arange(5).unbind(),
    "repeated": torch.arange(3.0)[:, None].expand(3, 7).unbind(),
}
APART = {
    "alone": WHOLE[:1].unbind(),
    "in another order": WHOLE.unbind()[::-1],
    "the same twice": (WHOLE[0], WHOLE[0]),
    "every other": WHOLE[::2].unbind(),
    "transposed": WHOLE.mT.unbind(),
    "along the last axis": WHOLE.unbind(-1),
    "of several stacks": (WHOLE[0], WHOLE.clone()[1]),
    "of other dtypes": (WHOLE[0].view(torch.int32), WHOLE[1].view(torch.int32).to(torch.int32).clone()),
    "one of them with a derivative": (WHOLE[0], WHOLE[1].clone().requires_grad_()),
    "empty": torch.zeros(2, 0).unbind(),
}


def shares(x, tensors):
    return x.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ONE_AFTER_ANOTHER)
def test_what_lies_one_after_another_is_not_copied(name):
    tensors = ONE_AFTER_ANOTHER[name]
    assert torch.equal(stacked(tensors), torch.stack(tensors)) and shares(stacked(tensors), tensors)


@pytest.mark.parametrize("name", APART)
def test_all_else_is_copied(name):
    tensors = APART[name]
    found = stacked(tensors)
    assert torch.equal(found, torch.stack(tensors)) and found.is_contiguous()
    assert not shares(found, tensors) or not found.numel()


def test_derivatives_and_axes_of_vmap_pass():
    parts = WHOLE.unbind()
    assert torch.equal(vmap(lambda x: stacked(x.unbind()))(WHOLE), WHOLE)
    assert torch.equal(grad(lambda x: (stacked(x.unbind()) ** 2).sum())(WHOLE), 2 * WHOLE)
    leaf = WHOLE.clone().requires_grad_()
    (slope,) = torch.autograd.grad((stacked(leaf.unbind()) ** 2).sum(), leaf)
    assert torch.equal(slope, 2 * WHOLE) and torch.equal(torch.compile(stacked, backend="eager")(parts), WHOLE)


def test_parts_of_a_stack_are_neighbours_in_its_order():
    parts, alone = WHOLE.unbind(), WHOLE.clone()[0]
    tensors = [parts[2], alone, parts[0], WHOLE.mT.unbind()[1], parts[1]]
    assert sorted(neighbours(tensors)) == [[1], [2, 4, 0], [3]]
    assert vmap(lambda x: torch.tensor(len(neighbours([x, x]))))(WHOLE).tolist() == [2] * 4


@pytest.mark.parametrize("tensors", [WHOLE.unbind(), WHOLE[::2].unbind(), WHOLE.mT.unbind(), WHOLE.unbind(-1)])
def test_what_lies_at_equal_distances_is_not_copied(tensors):
    found = evenly_spaced(tensors)
    assert torch.equal(found, torch.stack(tensors)) and shares(found, tensors)


@pytest.mark.parametrize("tensors", [WHOLE[:1].unbind(), (WHOLE[0], WHOLE[0]), (WHOLE[0], WHOLE[1], WHOLE[3])])
def test_what_does_not_is_no_stack(tensors):
    assert evenly_spaced(tensors) is None


def test_layers_of_a_stack_are_picked_in_one_call():
    candidates, alone, same = torch.randn(3, 4, 5, 2), torch.randn(3, 5), torch.randn(2).expand(3, 2)
    tree = [*candidates.unbind(1)[::-1], alone, same]
    with Launches() as counted:
        found = picked(tree, torch.tensor([1]))
    assert all(torch.equal(x, y[1]) for x, y in zip(found, tree, strict=True))
    assert counted.kernels == {"index_select": 2}


def test_layers_of_a_stack_are_selected_in_one_call():
    new, old, other = torch.randn(4, 5), torch.randn(4, 5), torch.randn(3)
    for condition, expected in ((True, new), (False, old)):
        with Launches() as counted:
            found = selected(torch.tensor(condition), [*new.unbind(), other], [*old.unbind(), other])
        assert torch.equal(torch.stack(found[:-1]), expected) and found[-1] is other
        assert counted.kernels == {"where": 1}
    one_by_one = [x.clone() for x in old]
    assert torch.equal(torch.stack(selected(torch.tensor(False), list(new.unbind()), one_by_one)), old)
