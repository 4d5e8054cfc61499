"""The trainings of all cases, once for each number of processes."""

from functools import cache

import pytest

from tests.distributed.cases import every_case
from tests.distributed.processes import run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Results by rank of all cases of a number of processes."""

    @cache
    def results(world):
        try:
            return run(every_case, world, tmp_path_factory.mktemp(f"world{world}"))
        except Exception as error:
            return error  # once for all tests

    def check(world):
        if isinstance(results(world), Exception):
            raise results(world)
        return results(world)

    return check
