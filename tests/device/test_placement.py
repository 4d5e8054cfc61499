"""Whatever a step makes is on the device of its parameters, wherever that is and whatever the default device is.

Neither law needs an accelerator: a step runs on the device "meta", where tensors have no values and meet no others, and
with "meta" as the default device, on which a tensor lands that is made without naming one.
"""

import sys
from contextlib import nullcontext
from functools import partial

import optree
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lrkfac
from tests import cases
from tests.described import layers_of
from tests.device.conftest import chosen_device
from tests.device.moving import moved_case, on_device
from tests.device.test_steps import CHAINS, WIDE
from tests.test_training_step import noises, stepper

META = torch.device("meta")
SMALL = cases.make_case("small", (cases.linear(3, 4), cases.tanh, cases.linear(4, 2)), (5, 3))
GAUSSIAN, GROUPS = cases.LINEAR[1], cases.CONVOLUTION[3]
CASES = [SMALL, WIDE, cases.LINEAR[6], GAUSSIAN, cases.SEQUENCE[2], GROUPS]


class Elsewhere(TorchDispatchMode):
    """Notes the operations that take or make a tensor on another device than "meta"; those without axes on demand."""

    def __init__(self, scalars=True):
        super().__init__()
        self.scalars, self.found = scalars, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in optree.tree_leaves((args, kwargs or {}, result)) if isinstance(x, torch.Tensor)]
        if any(x.device != META and (x.ndim or self.scalars) for x in tensors):
            self.found.append(str(func))
        return result


@pytest.fixture
def meta_is_a_device(monkeypatch):
    """As any other: it has no autocast, and is refused since its tensors have no values."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("lrkfac.") and hasattr(module, "check_values"):
            monkeypatch.setattr(module, "check_values", lambda **trees: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)


def steps(case, step, init, noise, around=lambda statistics: nullcontext()):
    """A refresh, a plain step and a refresh."""
    params, state = case.params, init(case.params)
    for i, statistics in enumerate((True, False, True)):
        with around(statistics):
            params, state, loss = step(params, state, case.inputs, case.targets, noise[i], statistics)
    return params, state, loss


OTHER_ESTIMATORS = [(case, estimator) for case in (WIDE, GROUPS) for estimator in ("exact", "empirical")]


@pytest.mark.parametrize("case, estimator", [*[(case, "mc") for case in CASES], *OTHER_ESTIMATORS])
def test_every_estimator_stays_there(case, estimator, meta_is_a_device):
    stays_there(case, CHAINS["kept low rank"], estimator)


@pytest.mark.parametrize("chain", [name for name in CHAINS if name != "injected"])  # looks at its numbers, at first
def test_every_chain_stays_there(chain, meta_is_a_device):
    stays_there(SMALL, CHAINS[chain])


def stays_there(case, make, estimator="mc"):
    """Layers are found with values. A number may leave the device in a refresh, whose factorisations are checked."""
    step, init = stepper(case, make, estimator, thin=case is WIDE)
    there, noise = moved_case(case, META, None), noises(case, 3).to(META)
    modes = {statistics: Elsewhere(scalars=not statistics) for statistics in (True, False)}
    result = steps(there, step, init, noise, modes.get)
    assert on_device(result, META) and not [mode.found for mode in modes.values() if mode.found]


def test_labels_are_drawn_there(meta_is_a_device):
    case = moved_case(SMALL, META, None)
    layers = lrkfac.find_layers(SMALL.model, SMALL.params, SMALL.inputs)
    evaluate = lrkfac.evaluator(case.model, lrkfac.categorical(), layers)
    with Elsewhere(scalars=False) as elsewhere:
        assert on_device(evaluate(case.params, case.inputs, case.targets).statistics, META)
    assert not elsewhere.found


@pytest.mark.parametrize("name", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(name):
    with pytest.raises(pytest.UsageError, match=f"LRKFAC_TEST_DEVICE: expected a device .*{name}"):
        chosen_device(name)


def test_a_tensor_elsewhere_is_noted():
    x, scalar = torch.ones(2, device=META), torch.ones(())
    with Elsewhere() as every, Elsewhere(scalars=False) as with_axes:
        x.mul(scalar)
        assert every.found == ["aten.mul.Tensor"] and not with_axes.found
        torch.ones(2)
    assert with_axes.found == ["aten.ones.default"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layers_are_found_whatever_the_default_device(case):
    torch.set_default_device("meta")
    try:
        found = lrkfac.find_layers(case.model, case.params, case.inputs)
    finally:
        torch.set_default_device(None)
    assert found == layers_of(case)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("case", [SMALL, GAUSSIAN, GROUPS], ids=lambda case: case.name)
def test_nothing_is_made_on_the_default_device(case, chain):
    noise, make = noises(case, 3), partial(stepper, case, CHAINS[chain], "exact" if case is GAUSSIAN else "mc")
    expected = steps(case, *make(), noise)
    torch.set_default_device("meta")
    try:
        found = steps(case, *make(), noise)
    finally:
        torch.set_default_device(None)
    leaves = optree.tree_leaves(found), optree.tree_leaves(expected)
    assert on_device(found, torch.device("cpu")) and all(map(torch.equal, *leaves))
