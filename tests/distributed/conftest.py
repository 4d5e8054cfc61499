"""The trainings of all cases, once for each number of processes."""

import pytest

from tests.distributed.cases import CASES, every_case
from tests.distributed.processes import run


@pytest.fixture(scope="session", params=sorted(CASES))
def world(request):
    """A number of processes."""
    return request.param


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Results by rank of all cases of a number of processes."""
    known = {}

    def results(world):
        if world not in known:
            known[world] = run(every_case, world, tmp_path_factory.mktemp(f"world{world}"))
        return known[world]

    return results
