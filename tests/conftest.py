"""What holds for all tests: hypothesis profiles, seeds, checked shapes."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

from tests.shape_checking import check_shapes, count_anew

# No deadline and no complaint about slowness: the first call of an operation in torch takes far longer than
# the others.
_slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=20, **_slow)
settings.register_profile("ci", max_examples=50, derandomize=True, **_slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# The tensors of tests are too small to share among threads, which then only wait for each other.
torch.set_num_threads(1)


class _TorchRandom:
    """torch's global generator in the terms of ``random.Random``."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Each example of hypothesis starts from the same seed; else one that fails need not fail again.
register_random(_TorchRandom)

check_shapes("lrkfac", checked_within="lrkfac.core")


def pytest_collection_finish() -> None:
    """What is imported stays, and the collector of garbage need not visit it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Random numbers of a test depend neither on the tests before it nor on the machine's state."""
    count_anew()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
