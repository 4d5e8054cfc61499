"""The device of these tests: the CPU, or that of ``LRKFAC_TEST_DEVICE=cuda python -m pytest -m device``."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lrkfac.core.base.dtypes import most_precise

HERE = Path(__file__).parent
VARIABLE = "LRKFAC_TEST_DEVICE"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.device)


def name_of_device() -> str:
    return os.environ.get(VARIABLE, "cpu")


def chosen_device(name: str) -> torch.device:
    """The device of a name such as "cuda" or "cuda:1", after a computation there; an error where there is none."""
    try:
        device = torch.ones(2, device=name).add(1).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise pytest.UsageError(
            f"{VARIABLE}: expected a device of this machine, such as cpu, cuda or cuda:1, got {name!r} ({error})"
        ) from error
    if device.type == "meta":
        raise pytest.UsageError(f"{VARIABLE}: expected a device with values, got {name!r}")
    return device


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Without TF32, which makes convolutions of float32 on a GPU others than those of the CPU."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield chosen_device(name_of_device())
    torch.backends.cudnn.allow_tf32 = before


def pytest_generate_tests(metafunc):
    """All other tests compare in float64 on the CPU; there, float64 would be compared with itself."""
    if "dtype" in metafunc.fixturenames:
        names = ["float32"] if name_of_device() == "cpu" else ["float64", "float32"]
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names, indirect=True)


@pytest.fixture
def dtype(request, device) -> torch.dtype:
    """Each dtype that the device has."""
    if request.param not in (torch.float32, most_precise(device)):
        pytest.skip(f"{device} has no {request.param}")
    return request.param
