"""The trainings of all cases, once for each number of processes."""

import os
import pickle
import time
from functools import cache

import pytest

from tests.distributed.cases import every_case
from tests.distributed.processes import run

LIMIT = 300.0
"""Seconds that a worker of pytest-xdist waits for another that trains."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Results by rank of all cases of a number of processes, shared by the workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    @cache
    def results(world):
        path = shared / f"world{world}"
        try:
            path.mkdir()
        except FileExistsError:
            return awaited(path / "done")
        try:
            done = run(every_case, world, path, limit=LIMIT)
        except Exception as error:
            done = str(error)  # once for all tests
        (path / "partial").write_bytes(pickle.dumps(done))
        (path / "partial").rename(path / "done")
        return done

    def check(world):
        done = results(world)
        assert not isinstance(done, str), done
        return done

    return check


def awaited(path):
    """What another worker writes."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        if time.monotonic() > end:
            return f"no result after {LIMIT:g} seconds"
        time.sleep(0.2)
    return pickle.loads(path.read_bytes())
